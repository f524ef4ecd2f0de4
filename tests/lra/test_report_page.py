"""report.html: one file that asks for nothing else; in a browser it sorts, and is readable light, dark and narrow."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lra.config import Cell, Model
from lra.html import page, table_html
from lra.report import write_report
from lra.tables import Column, Entry, Table

from .fake_results import result

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a full-size task, two models, scratch and pretrained, with the numbers published for it."""
    made = [
        result(Cell(model=Model(mixer=mixer), regime=regime, seed=seed), base + 0.01 * seed)
        for mixer, regime, base in (("lru", "scratch", 0.4), ("lru", "finetune", 0.6), ("attention", "scratch", 0.5))
        for seed in range(2)
    ]
    return write_report(made, tmp_path_factory.mktemp("report"))[1]


class Reader(HTMLParser):
    """Collects tags, ids, links, and the rows of one table."""

    def __init__(self, text: str, table: str = "") -> None:
        super().__init__()
        self.table, self.inside, self.sorted = table, False, {}
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        target = named.get("src") or named.get("href") or ""
        (self.links if target.startswith("#") else self.outside).append(target)
        if tag == "table":
            self.inside = named["id"] == self.table
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("th", "td"):
            self.rows[-1].append("")
        if self.inside and "aria-sort" in named:
            self.sorted[named["data-column"]] = named["aria-sort"]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "table"

    def handle_data(self, data):
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_page_needs_nothing_else(report):
    text = report.read_text()
    read = Reader(text)
    assert all(target == "" or target.startswith("data:") for target in read.outside)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    assert len(set(read.ids)) == len(read.ids) and {link[1:] for link in read.links} <= set(read.ids)
    assert text.count("data:image/png;base64,") == 2 == read.tags.count("img")
    assert "published" in text and "<strong>" in text and "default-src 'none'" in text


def test_text_is_escaped():
    table = Table("t", "a < b & c", [Column("<i>"), Column("x", "{g}")])
    table.add("<script>alert(1)</script>", Entry('"q" & {0}', 1.0, notes=(table.note("see `a<b`"),)))
    table.below = ["**bold** of *it* <b>"]
    text = table_html(table)
    assert "<script>" not in text and "&lt;script&gt;" in text and "<i>" not in text and "{g}" in text
    assert "<strong>bold</strong> of <em>it</em> &lt;b&gt;" in text and "<code>a&lt;b</code>" in text
    assert 'href="#t-note-1"' in text and 'id="t-note-1"' in text
    assert page("A & B", []).count("A &amp; B") == 2


def test_a_table_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="2 entries for 1 columns"):
        Table("t", "title", [Column("a")]).add("x", "y")


def browse(address: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """Output of the browser, and what it wrote to its console."""
    assert BROWSER is not None
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root may not have one
    quiet = [
        "--headless=new",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
    ]
    command = [BROWSER, *sandbox, *quiet, f"--user-data-dir={profile}", *flags, address]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def with_script(report: Path, folder: Path, script: str) -> Path:
    """A copy of the page that runs a script of ours at the end."""
    made = folder / "scripted.html"
    made.write_text(report.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return made


def numbers(read: Reader, column: int) -> list[float]:
    """The numbers of a column from top to bottom, without empty places."""
    found = [re.match(r"[\d.]+", row[column]) for row in read.rows if len(row) > 4]
    return [float(match[0]) for match in found if match]


TABLE = "listops-bidirectional-accuracy"


@needs_browser
def test_a_link_opens_a_sorted_table_without_an_error(report, tmp_path):
    columns = Reader(report.read_text(), TABLE).rows[0]
    at = columns.index("accuracy %")
    dom, console = browse(f"{report.as_uri()}#sort={TABLE}:{at}:ascending", tmp_path / "profile", "--dump-dom")
    assert console == []
    read, plain = Reader(dom, TABLE), Reader(report.read_text(), TABLE)
    values = numbers(read, at)
    assert len(values) > 15 and values == sorted(values) != numbers(plain, at)
    assert read.sorted == {str(at): "ascending"}
    assert sorted(map(tuple, read.rows)) == sorted(map(tuple, plain.rows)), "sorting loses no row"


@needs_browser
def test_the_heads_sort_and_the_address_follows(report, tmp_path):
    at = Reader(report.read_text(), TABLE).rows[0].index("accuracy %")
    script = f"""
        const table = document.getElementById("{TABLE}"), said = [];
        const button = (column) => table.querySelector(`th[data-column="${{column}}"] button`);
        const pretrained = document.querySelector("#overview-bidirectional th[data-column='2'] button");
        for (let i = 0; i < 2; i++) {{  // of ours only the lru was pretrained, and few of the published models
            pretrained.click();
            const rows = [...document.getElementById("overview-bidirectional").tBodies[0].rows];
            const full = rows.map((row) => row.cells[2].textContent !== "");
            said.push(full[0] && full.lastIndexOf(true) < full.indexOf(false));
        }}
        for (let i = 0; i < 3; i++) {{
            button({at}).click();
            said.push(location.hash.split(":").at(-1));
        }}
        document.getElementById("show-published").click();
        said.push(getComputedStyle(table.querySelector("tr.published")).display, button({at}).tabIndex, location.hash);
        document.title = said.join(" ");"""
    dom, console = browse(with_script(report, tmp_path, script).as_uri(), tmp_path / "profile", "--dump-dom")
    assert console == []
    values = numbers(Reader(dom, TABLE), at)
    assert values == sorted(values, reverse=True) != []
    (title,) = re.findall("<title>(.*)</title>", dom)
    assert title.split() == [
        *("true", "true"),  # empty places are last either way
        *("descending", "ascending", "descending"),  # highest first
        *("none", "0"),  # published rows hide; the heads are reached by the keyboard
        f"#sort={TABLE}:{at}:descending",
    ]


@needs_browser
def test_an_error_in_the_page_would_be_seen(report, tmp_path):
    _, console = browse(with_script(report, tmp_path, "missing();").as_uri(), tmp_path / "profile", "--dump-dom")
    assert any("missing is not defined" in line for line in console)
    outside = "const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i);"
    _, console = browse(with_script(report, tmp_path, outside).as_uri(), tmp_path / "profile", "--dump-dom")
    assert any("Content Security Policy" in line for line in console)


@needs_browser
@pytest.mark.parametrize(("scheme", "bright"), [(1, True), (0, False)], ids=["light", "dark"])
def test_screenshots_show_the_page(report, tmp_path, scheme, bright):
    from PIL import Image

    path = tmp_path / "shot.png"
    flags = [f"--screenshot={path}", "--window-size=500,2000", f"--blink-settings=preferredColorScheme={scheme}"]
    _, console = browse(report.as_uri(), tmp_path / "profile", *flags)
    assert console == []
    pixels = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert pixels.shape == (2000, 500)
    ground = pixels[5, 5]
    assert (ground > 240) if bright else (ground < 40)
    unlike = abs(pixels - ground) > 100
    assert 0.01 < unlike.mean() < 0.6, "text and pictures on a ground of one colour"
    assert unlike[:1000].any(axis=1).mean() > 0.2, "from top to bottom"


@needs_browser
def test_a_narrow_screen_scrolls_tables_and_not_the_page(report, tmp_path):
    script = f"""
        const box = document.getElementById("{TABLE}").parentElement, root = document.documentElement;
        document.title = [root.scrollWidth <= innerWidth, box.scrollWidth > box.clientWidth].join();"""
    dom, _ = browse(
        with_script(report, tmp_path, script).as_uri(), tmp_path / "profile", "--dump-dom", "--window-size=500,900"
    )
    assert "<title>true,true</title>" in dom
