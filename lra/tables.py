"""Tables of a report, before they are Markdown, HTML or lines of a terminal."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table."""

    text: str
    order: float | str | None = None
    """What a sortable table orders by; None sorts last, whichever way."""
    bold: bool = False
    notes: tuple[int, ...] = ()
    """Indices of the table's footnotes."""


@dataclass(frozen=True)
class Column:
    """A column; columns of one `group` that stand side by side share a header above their own."""

    name: str
    group: str = ""

    @property
    def title(self) -> str:
        return f"{self.group}, {self.name}" if self.group else self.name


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    entries: list[Entry]
    kind: str = "ours"
    """ours, rule (a rule that needs no network) or published; the last is set in italics."""


@dataclass
class Table:
    """A titled table with footnotes; `slug` names it in links."""

    slug: str
    title: str
    columns: list[Column]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)
    """Paragraphs under the table."""

    def note(self, text: str) -> int:
        """The index of a footnote, which is added if it is new."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text)

    def add(self, *entries: Entry | str, kind: str = "ours") -> None:
        """Adds a row; a plain string sorts by itself, an empty one last."""
        made = [e if isinstance(e, Entry) else Entry(e, e or None) for e in entries]
        if len(made) != len(self.columns):
            raise ValueError(f"table {self.title!r}: {len(made)} entries for {len(self.columns)} columns")
        self.rows.append(Row(made, kind))

    def markdown(self) -> str:
        """GitHub's Markdown: the table, its paragraphs, its footnotes."""
        lines = [[escape(c.title) for c in self.columns], ["---"] * len(self.columns)]
        lines += [[_marked(entry, row.kind) for entry in row.entries] for row in self.rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        text += "".join(f"\n{paragraph}\n" for paragraph in self.below)
        if self.notes:
            text += "\n" + "\n".join(f"{i + 1}. {note}" for i, note in enumerate(self.notes)) + "\n"
        return text

    def show(self, leave_out: frozenset[str] = frozenset()) -> None:
        """Prints our rows and the rules in the terminal, without the columns named."""
        from lra.listing import table

        kept = [i for i, column in enumerate(self.columns) if column.name not in leave_out]
        rows = [[row.entries[i].text for i in kept] for row in self.rows if row.kind != "published"]
        table(self.title, [self.columns[i].title for i in kept], rows)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def accuracy(value: float, *, bold: bool = False) -> Entry:
    """An accuracy in percent."""
    return Entry(percent(value), value, bold)


def mean_std(mean: float, std: float | None, n: int, *, bold: bool = False, notes: tuple[int, ...] = ()) -> Entry:
    """`61.0 ± 1.0 (3)`: mean, standard deviation over n seeds, n; one seed has no deviation."""
    spread = "" if std is None else f" ± {percent(std)}"
    return Entry(f"{percent(mean)}{spread} ({n})", mean, bold, notes)


def leader(values: list[float | None], ahead: float = 0.01) -> int | None:
    """The index of the highest value if it leads the second by at least `ahead`, else None.

    Gaps under one point mean nothing here: repeating a published run has moved it by three.
    """
    ranked = sorted((v, i) for i, v in enumerate(values) if v is not None)
    # The slack is for what binary floating point does to 0.61 - 0.60.
    if len(ranked) > 1 and ranked[-1][0] - ranked[-2][0] >= ahead - 1e-9:
        return ranked[-1][1]
    return None


def escape(text: str) -> str:
    """Text that Markdown leaves alone inside a table."""
    for character in "\\|*<":
        text = text.replace(character, "\\" + character)
    return text


def _marked(entry: Entry, kind: str) -> str:
    mark = ("**" if entry.bold else "") + ("*" if kind == "published" else "") if entry.text else ""
    numbers = ", ".join(str(i + 1) for i in entry.notes)
    return f"{mark}{escape(entry.text)}{mark[::-1]}" + (f" <sup>{numbers}</sup>" if numbers else "")
