"""The report of a folder of results: Markdown, CSV, a picture, and the same tables in the terminal."""

from pathlib import Path
from typing import Any

from lra.files import write_csv, write_text
from lra.results import Group, Section, direction, highest_line, sections, standard_error

WIDE = ("width x blocks", "steps", "tokens (M)", "Tflop")


def write_report(results: list[dict[str, Any]], out: Path) -> list[Path]:
    """Writes report.md, report.csv and report.png to `out` and returns the paths.

    Args:
        results: of cells, as `lra.results.load_results` reads them.
    """
    from lra.plot import save_plot

    found = sections(results)
    paths = [out / "report.md", out / "report.csv", out / "report.png"]
    write_text(paths[0], "\n".join(markdown(section) for section in found) + "\n![accuracies](report.png)\n")
    write_csv(paths[1], [flat(result) for result in results if "test" in result])
    save_plot(found, paths[2])
    return paths


def show_report(results: list[dict[str, Any]]) -> None:
    """Prints the tables of a report, without the columns that would not fit into a terminal."""
    from lra.listing import table

    for section in sections(results):
        columns, rows = accuracy_table(section)
        kept = [i for i, column in enumerate(columns) if column not in WIDE]
        table(section.title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
        table("Test accuracy (%) by length in tokens", *length_table(section))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def accuracy_table(section: Section) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the groups, then the reference lines, in percent."""
    varying = section.varying()
    costs = ["steps", "tokens (M)", "Tflop", "seconds"]
    columns = ["model", "regime", *varying, "accuracy %", "std", "seeds", "reaches", "width x blocks", "parameters"]
    rows = []
    for g in section.groups:
        spent = [both(g, "steps"), both(g, "tokens", 1e6), both(g, "flops", 1e12), both(g, "seconds")]
        std = "-" if g.std is None else percent(g.std)
        found = [percent(g.mean), std, str(len(g.results)), highest_line(g.mean, section.lines)]
        size = [g.size, f"{g.first['parameters']['total']:,}"]
        rows.append([g.model, g.regime, *(get(g) for get in varying.values()), *found, *size, *spent])
    empty = [""] * (len(varying) + 1)
    rest = [""] * (5 + len(costs))
    rows += [[f"({name})", *empty, percent(value), *rest] for name, value in section.lines.items()]
    return columns + costs, rows


def both(group: Group, name: str, unit: float = 1.0) -> str:
    """A cost, or `pretraining + fine-tuning`."""
    parts = [part / unit for part in group.cost(name) if part]
    return " + ".join(f"{part:,.0f}" if part >= 100 or unit == 1 else f"{part:.2g}" for part in parts)


def length_table(section: Section) -> tuple[list[str], list[list[str]]]:
    """Header and rows of accuracy by length."""
    ranges = [name for name, _ in section.groups[0].by_length()]
    varying = section.varying()
    rows = [
        [g.model, g.regime, *(get(g) for get in varying.values()), *(percent(a) for _, a in g.by_length())]
        for g in section.groups
    ]
    return ["model", "regime", *varying, *ranges], rows


def markdown(section: Section) -> str:
    """One section of report.md."""
    n = section.first["data"]["test"]["rows"]
    changes = f"Not the task's defaults (in brackets): {', '.join(section.changes)}.\n" if section.changes else ""
    worst = max(standard_error(g.mean, n) for g in section.groups)
    machines = sorted({f"{r['device']}, torch {r['versions']['torch']}" for g in section.groups for r in g.results})
    return f"""## {section.title}

{changes}
{markdown_table(*accuracy_table(section))}

In brackets: rules that need no network, on the same {n:,} test sequences; `reaches` is the best of them that a mean
accuracy is not below. std is over seeds; the standard error of one accuracy on this test split is {percent(worst)}
points or less. Costs are pretraining + training on labels. Tflop are estimated: 6 per block parameter and token, and
the pairs of softmax attention. The weights of the best validation accuracy are scored on the test split, once.
Run on: {"; ".join(machines)}.

### Test accuracy (%) by length in tokens

{markdown_table(*length_table(section))}
"""


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def flat(result: dict[str, Any]) -> dict[str, Any]:
    """One line of report.csv: one cell."""
    config, before = result["config"], result.get("pretrain", {})
    return {
        "task": result["plan"]["task"]["name"],
        "direction": direction(result)[0],
        "model": config["model"]["mixer"],
        "d_model": config["model"]["d_model"],
        "n_layers": config["model"]["n_layers"],
        "regime": config["regime"],
        "seed": config["seed"],
        "lr": config["optim"]["lr"],
        "test_accuracy": result["test"]["accuracy"],
        "val_accuracy": result["val"]["accuracy"],
        "pretrain_val_accuracy": before.get("val", {}).get("accuracy", ""),
        "parameters": result["parameters"]["total"],
        "parameters_blocks": result["parameters"]["blocks"],
        **{f"{name}_pretrain": before.get(name, 0) for name in ("steps", "tokens", "flops", "seconds")},
        **{name: result[name] for name in ("steps", "tokens", "flops", "seconds")},
        **{f"line {name}": value for name, value in result["reference_lines"].items()},
        "device": result["device"],
        "commit": result["commit"],
        "key": result["key"],
    }
