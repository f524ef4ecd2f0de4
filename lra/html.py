"""report.html: one page that needs nothing else, with sortable tables, for light and dark screens, wide and narrow."""

import base64
import re
from html import escape
from pathlib import Path

from lra.tables import Column, Entry, Row, Table

Part = tuple[str, list[str], list[Table], list[Path]]
"""Title, paragraphs, tables and pictures."""

# The page may run its own script and style and show its own pictures; it asks no other place for anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, parts: list[Part]) -> str:
    """The whole page; pictures, style and script are inside it.

    Args:
        title: of the page.
        parts: sections in order; their pictures are read from the paths.
    """
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<li><a href="#part-{i}">{escape(part[0])}</a></li>' for i, part in enumerate(parts))
    body = "\n".join(section(i, part) for i, part in enumerate(parts))
    published = any(row.kind == "published" for part in parts for t in part[2] for row in t.rows)
    box = '<p><label><input type="checkbox" id="show-published" checked> show published numbers</label></p>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<p class="below">The head of a column sorts by it.</p>
{box if published else ""}
{body}
<script>
{script}</script>
</body>
</html>
"""


def section(index: int, part: Part) -> str:
    title, texts, tables, pictures = part
    return "\n".join(
        [
            f'<section aria-labelledby="part-{index}">\n<h2 id="part-{index}">{escape(title)}</h2>',
            *(f"<p>{inline(text)}</p>" for text in texts),
            *(table_html(table) for table in tables[:1]),
            *(picture(path, title) for path in pictures),
            *(table_html(table) for table in tables[1:]),
            "</section>",
        ]
    )


def picture(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img alt="Plots of the tables: {escape(title)}" src="data:image/png;base64,{data}"></figure>'


def inline(text: str) -> str:
    """Escapes a paragraph; `code`, **bold** and *italics* are kept."""
    text = escape(text)
    for pattern, tag in ((r"`([^`]+)`", "code"), (r"\*\*([^*]+)\*\*", "strong"), (r"\*([^*]+)\*", "em")):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return text


def table_html(table: Table) -> str:
    """A table in a box that scrolls by itself, then its paragraphs and footnotes."""
    words = [wordy(table, i) for i in range(len(table.columns))]
    rows = "\n".join(row_html(i, row, words, table.slug) for i, row in enumerate(table.rows))
    below = "".join(f'\n<p class="below">{inline(text)}</p>' for text in table.below)
    notes = "".join(f'<li id="{table.slug}-note-{i + 1}">{inline(note)}</li>' for i, note in enumerate(table.notes))
    title = escape(table.title)
    return f"""<h3>{title}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="{title}">
<table id="{table.slug}">
<thead>
{header(table.columns, words)}
</thead>
<tbody>
{rows}
</tbody>
</table>
</div>{below}{f'<ol class="notes">{notes}</ol>' if notes else ""}"""


def wordy(table: Table, column: int) -> bool:
    """Whether a column holds names rather than numbers."""
    orders = [row.entries[column].order for row in table.rows]
    return column == 0 or any(isinstance(order, str) for order in orders)


def header(columns: list[Column], words: list[bool]) -> str:
    """One row of heads, or two where columns have groups."""

    def head(i: int, rows: str = "") -> str:
        kind = " class=text" if words[i] else ""
        button = f'<button type="button">{escape(columns[i].name)}</button>'
        return f'<th scope="col" data-column="{i}"{rows}{kind}>{button}</th>'

    if not any(column.group for column in columns):
        return f"<tr>{''.join(map(head, range(len(columns))))}</tr>"
    above, below, i = [], [], 0
    while i < len(columns):
        if not columns[i].group:
            above.append(head(i, ' rowspan="2"'))
            i += 1
            continue
        end = i
        while end < len(columns) and columns[end].group == columns[i].group:
            below.append(head(end))
            end += 1
        above.append(f'<th scope="colgroup" class="group" colspan="{end - i}">{escape(columns[i].group)}</th>')
        i = end
    return f"<tr>{''.join(above)}</tr>\n<tr>{''.join(below)}</tr>"


def row_html(index: int, row: Row, words: list[bool], slug: str) -> str:
    cells = []
    for i, entry in enumerate(row.entries):
        tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
        value = "" if entry.order is None else f' data-value="{escape(str(entry.order))}"'
        cells.append(f"<{tag}{scope}{' class=text' if words[i] else ''}{value}>{entry_html(entry, slug)}</{tag}>")
    return f'<tr class="{row.kind}" data-row="{index}">{"".join(cells)}</tr>'


def entry_html(entry: Entry, slug: str) -> str:
    text = escape(entry.text)
    marks = ", ".join(f'<a href="#{slug}-note-{i + 1}">{i + 1}</a>' for i in entry.notes)
    return (f"<strong>{text}</strong>" if entry.bold else text) + (f" <sup>{marks}</sup>" if marks else "")
