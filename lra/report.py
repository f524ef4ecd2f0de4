"""The report of a folder of results: Markdown, one HTML page, CSV, pictures, and the tables in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lra.files import write_csv, write_text
from lra.groups import UNCHANGED, direction
from lra.html import page
from lra.overview import overviews
from lra.rates import Choice
from lra.results import Section, sections
from lra.tables import Table
from lra.task_tables import COSTS, introduction, task_tables

WIDE = frozenset({"width x blocks", *COSTS} - {"seconds"})


def write_report(results: list[dict[str, Any]], out: Path, choices: Sequence[Choice] = ()) -> list[Path]:
    """Writes report.md, report.html, report.csv and the pictures to `out` and returns the paths.

    `report.png` shows all tasks, `report-<task>-<direction>.png` one; `report-shares.png` and `report-scales.png` are
    written if the results have several shares of pretraining or of the data.

    Args:
        results: of cells, as `lra.results.load_results` reads them.
        out: folder.
        choices: of learning rates, as `lra.results.load_choices` reads them.
    """
    from lra.plot import colours_of, save_axes, save_overview, save_section

    found = sections(results)
    names = slugs(found)
    pictures = [out / "report.png", *save_axes(found, out), *(out / f"report-{slug}.png" for slug in names)]
    save_overview(found, pictures[0])
    for section, path in zip(found, pictures[-len(found) :], strict=True):
        save_section(section, path, colours_of(found))

    parts: list[tuple[str, list[str], list[Table], list[Path]]] = [
        ("Overview", [], overviews(found), pictures[: -len(found)])
    ]
    for section, slug, path in zip(found, names, pictures[-len(found) :], strict=True):
        parts.append((title(section), introduction(section), task_tables(section, slug, choices), [path]))
    text = "\n".join(markdown(*part) for part in parts)
    paths = [out / "report.md", out / "report.html", out / "report.csv"]
    write_text(paths[0], "# Long Range Arena: report\n\n" + text)
    write_text(paths[1], page("Long Range Arena: report", parts))
    rows = [flat(result) for result in results if "test" in result]
    columns = dict.fromkeys(column for row in rows for column in row)  # tasks have rules and probes of their own
    write_csv(paths[2], [{column: row.get(column, "") for column in columns} for row in rows])
    return paths + pictures


def show_report(results: list[dict[str, Any]], choices: Sequence[Choice] = ()) -> None:
    """Prints the tables of a report, without the columns that would not fit into a terminal."""
    found = sections(results)
    for table in overviews(found):
        table.show()
    for section, slug in zip(found, slugs(found), strict=True):
        for table in task_tables(section, slug, choices):
            table.show(WIDE)


def title(section: Section) -> str:
    return section.title + (" (changed)" if section.changes else "")


def slugs(found: list[Section]) -> list[str]:
    """`listops-causal`, `listops-causal-2`: what files and links of the sections are called."""
    names: list[str] = []
    for section in found:
        name, k = f"{section.name}-{section.direction}", 2
        while name in names:
            name, k = f"{section.name}-{section.direction}-{k}", k + 1
        names.append(name)
    return names


def markdown(title: str, texts: list[str], tables: list[Table], pictures: list[Path]) -> str:
    """One part of report.md: its paragraphs, tables, and pictures below the first table."""
    shown = [f"### {table.title}\n\n{table.markdown()}" for table in tables]
    images = [f"![{path.stem}]({path.name})\n" for path in pictures]
    return "\n".join([f"## {title}\n", *(f"{text}\n" for text in texts), *shown[:1], *images, *shown[1:]])


def flat(result: dict[str, Any]) -> dict[str, Any]:
    """One line of report.csv: one cell."""
    config, before = result["config"], result.get("pretrain", {})
    metric = before.get("metric", "")
    spent = ("steps", "tokens", "flops", "seconds", "loader_seconds")
    return {
        "task": result["plan"]["task"]["name"],
        "direction": direction(result)[0],
        "model": config["model"]["mixer"],
        "d_model": config["model"]["d_model"],
        "n_layers": config["model"]["n_layers"],
        "regime": config["regime"],
        "seed": config["seed"],
        "lr": config["optim"]["lr"],
        "pretrain_share": config["budget"]["pretrain_share"] if before else 0.0,
        "data": config["budget"]["data"],
        "labels": result["data"]["train"]["rows"],
        "encoding": result["encoding"],
        "test_accuracy": result["test"]["accuracy"],
        "val_accuracy": result["val"][result["metric"]],
        "pretrain_metric": metric,
        "pretrain_val": before.get("val", {}).get(metric, ""),
        "parameters": result["parameters"]["total"],
        "parameters_blocks": result["parameters"]["blocks"],
        **{f"{name}_pretrain": before.get(name, 0) for name in spent},
        **{name: result[name] for name in spent},
        "device": result["device"],
        "commit": result["commit"],
        "key": result["key"],
        **{f"{probe} {size}": value for probe in UNCHANGED for size, value in result["test"].get(probe, {}).items()},
        **{f"line {name}": value for name, value in result["reference_lines"].items()},
    }
