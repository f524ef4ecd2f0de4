"""The picture of a report: accuracies against the reference lines, and the curves that led there."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from lra.files import write_whole
from lra.results import Group, Section

COLOURS = ("#1f5fa8", "#d9711c", "#2c8c4b", "#8a4fae", "#b3273a", "#6b6b6b")  # one per model


def save_plot(sections: list[Section], path: Path) -> None:
    """Writes a PNG with one row of three panels per section."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6 * len(sections)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sections), 3, squeeze=False, width_ratios=(1.5, 1, 1))
    for section, (bars, curves, pretraining) in zip(sections, axes, strict=True):
        models = sorted({g.model for g in section.groups}, key=[g.model for g in section.groups].index)
        colours = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
        draw_accuracies(bars, section, colours)
        draw_curves(curves, section, colours)
        draw_pretraining(pretraining, section, colours)
    write_whole(path, lambda p: figure.savefig(p, dpi=120, format="png"))


def draw_accuracies(axis: Any, section: Section, colours: dict[str, str]) -> None:
    """Bars of the mean test accuracy, a dot per seed, a dashed line per reference."""
    for i, g in enumerate(section.groups):
        solid = "pretrain" in g.first
        axis.bar(i, 100 * g.mean, 0.62, color=colours[g.model], alpha=0.9 if solid else 0.45)
        if len(g.accuracies) > 1:
            axis.plot([i] * len(g.accuracies), [100 * a for a in g.accuracies], "k.", markersize=5)
        top = 100 * max(g.accuracies) + 1.5
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axis.annotate(f"{100 * g.mean:.1f}", (i, top), ha="center", fontsize=10, weight="bold", bbox=box, zorder=5)
    axis.set_xticks(range(len(section.groups)), [label(g, section) for g in section.groups], fontsize=8)
    end = len(section.groups) - 0.4
    heights = spread([100 * v for v in section.lines.values()], 4.0)
    for (name, value), height in zip(section.lines.items(), heights, strict=True):
        axis.axhline(100 * value, color="0.35", linestyle="--", linewidth=0.8)
        axis.annotate(
            f"{name} {100 * value:.1f}",
            (end, 100 * value),
            xytext=(end + 0.25, height),
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
        )
    axis.set_xlim(-0.6, end)
    axis.set_ylim(0, 104)
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(f"{section.title}: accuracy and rules without a network", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def spread(values: list[float], gap: float) -> list[float]:
    """Moves values apart so that labels at them do not overlap; their order stays, the top stays below 104."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    ceiling = 102.0
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def draw_curves(axis: Any, section: Section, colours: dict[str, str]) -> None:
    """Validation accuracy of the labels over all steps spent; fine-tuning starts after its pretraining."""
    for g in section.groups:
        for i, result in enumerate(g.results):
            spent = result.get("pretrain", {}).get("steps", 0)
            steps = [spent + row["step"] for row in result["curve"]]
            accuracy = [100 * row["val_accuracy"] for row in result["curve"]]
            style = "-" if spent else ":"
            axis.plot(steps, accuracy, style, color=colours[g.model], label=label(g, section, " ") if i == 0 else None)
    axis.set_xlabel("steps, pretraining included")
    axis.set_ylabel("validation accuracy (%)")
    axis.set_title("training on labels", fontsize=10)
    legend_below(axis)
    axis.spines[["top", "right"]].set_visible(False)


def draw_pretraining(axis: Any, section: Section, colours: dict[str, str]) -> None:
    """Denoising accuracy on the validation inputs."""
    drawn = False
    for g in section.groups:
        for i, result in enumerate(r for r in g.results if "pretrain" in r):
            curve = result["pretrain"]["curve"]
            accuracy = [100 * row["val_accuracy"] for row in curve]
            name = g.model if i == 0 else None
            axis.plot([row["step"] for row in curve], accuracy, "-", color=colours[g.model], label=name)
            drawn = True
    axis.set_title("pretraining" if drawn else "no pretraining in these results", fontsize=10)
    axis.set_xlabel("steps")
    hidden = "hidden" if section.direction == "bidirectional" else "next"
    axis.set_ylabel(f"validation accuracy on {hidden} tokens (%)")
    if drawn:
        legend_below(axis)
    axis.spines[["top", "right"]].set_visible(False)


def legend_below(axis: Any) -> None:
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def label(group: Group, section: Section, between: str = "\n") -> str:
    extra = "".join(f"{between}{name} {get(group)}" for name, get in section.varying().items())
    return f"{group.model}{between}{group.regime}{extra}"
