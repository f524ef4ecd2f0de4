"""The pictures of a report: all tasks, one task with reference lines and curves, shares of pretraining and data."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from lra.files import write_whole
from lra.groups import Group
from lra.overview import chosen, models_of, scales, shares, task_names
from lra.results import Section

# One per model, in the order in which they appear; told apart also without red and green.
COLOURS = ("#1f5fa8", "#d9711c", "#2c8c4b", "#8a4fae", "#b3273a", "#6b6b6b", "#17a2b8", "#a68a00", "#e377c2", "#4b3a2f")
MARKERS = "osD^vPX*"
SCORES = {"accuracy": "accuracy (%)", "r2": "R²"}


def save_overview(sections: list[Section], path: Path) -> None:
    """Writes a PNG with one panel per direction: tasks, models, scratch pale and pretrained solid."""
    directions = list(dict.fromkeys(s.direction for s in sections))
    colours = colours_of(sections)
    figure, axes = panels(len(directions), 1, (1.6 + 1.1 * max(6, len(sections)), 4.2))
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        draw_tasks(axis, [s for s in sections if s.direction == direction], colours)
        axis.set_title(f"{direction} models: pale from scratch, solid pretrained, dashed chance", fontsize=10)
    save(figure, path)


def save_axes(sections: list[Section], out: Path) -> list[Path]:
    """Writes report-shares.png and report-scales.png, as far as the results have several of them."""
    colours, made = colours_of(sections), []
    for name, some, draw in (("shares", shares, draw_shares), ("scales", scales, draw_scales)):
        if found := [s for s in sections if some(s)]:
            figure, axes = panels((len(found) + 2) // 3, min(3, len(found)), (5.0, 3.9))
            for axis in axes.flat[len(found) :]:
                axis.set_axis_off()
            for axis, section in zip(axes.flat, found, strict=False):
                draw(axis, section, colours)
            made.append(out / f"report-{name}.png")
            save(figure, made[-1])
    return made


def save_section(section: Section, path: Path, colours: dict[str, str]) -> None:
    """Writes a PNG of one task: accuracies and reference lines, training on labels, pretraining."""
    figure, axes = panels(1, 3, (5.2, 5.0), width_ratios=(1.5, 1, 1))
    bars, curves, pretraining = axes[0]
    draw_accuracies(bars, section, colours)
    draw_curves(curves, section, colours)
    draw_pretraining(pretraining, section, colours)
    save(figure, path)


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of rows x columns axes, each of about this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    write_whole(path, lambda p: figure.savefig(p, dpi=110, format="png"))


def colours_of(sections: list[Section]) -> dict[str, str]:
    """{model: colour}, the same in every picture of a report."""
    return {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models_of(sections))}


def draw_tasks(axis: Any, sections: list[Section], colours: dict[str, str]) -> None:
    """Groups of bars, one group per task; the whisker is one standard deviation, the dashes are chance."""
    models = models_of(sections)
    width = 0.84 / (2 * len(models))
    for x, section in enumerate(sections):
        for i, model in enumerate(models):
            for j, pretrained in enumerate((False, True)):
                if (g := chosen(section, model, pretrained)) is not None:
                    at = x - 0.42 + (2 * i + j + 0.5) * width
                    name = model if j or chosen(section, model, True) is None else None
                    alpha = 0.9 if pretrained else 0.45
                    axis.bar(at, 100 * g.mean, 0.9 * width, color=colours[model], alpha=alpha, label=name)
                    axis.errorbar(at, 100 * g.mean, 100 * (g.std or 0.0), color="0.2", linewidth=0.8)
        chance = 100 * section.first["chance"]
        axis.plot([x - 0.45, x + 0.45], [chance, chance], color="0.35", linestyle="--", linewidth=0.8)
    axis.set_xticks(range(len(sections)), [n.replace(" ", "\n", 1) for n in task_names(sections)], fontsize=8)
    axis.set_xlim(-0.6, max(4, len(sections)) - 0.4)
    axis.set_ylim(0, 104)
    axis.set_ylabel("test accuracy (%)")
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_shares(axis: Any, section: Section, colours: dict[str, str]) -> None:
    """Accuracy against the share of the steps that pretraining takes."""
    found = shares(section)
    for i, model in enumerate(dict.fromkeys(model for model, _ in found)):
        line(axis, {share: g for (m, share), g in found.items() if m == model}, colours[model], model, "-", i)
    axis.set_xlabel("share of the steps spent on pretraining (%)")
    finish(axis, section)


def draw_scales(axis: Any, section: Section, colours: dict[str, str]) -> None:
    """Accuracy against the share of the training rows, on a logarithmic axis."""
    found = scales(section)
    models = list(dict.fromkeys(model for model, _, _ in found))
    for model, pretrained in dict.fromkeys((model, pretrained) for model, pretrained, _ in found):
        points = {data: g for (m, p, data), g in found.items() if (m, p) == (model, pretrained)}
        name, style = f"{model}, {'pretrained' if pretrained else 'scratch'}", "-" if pretrained else ":"
        line(axis, points, colours[model], name, style, models.index(model))
    axis.set_xscale("log")
    ticks = sorted({100 * value for _, _, value in found})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("training rows (%)")
    finish(axis, section)


def line(axis: Any, points: dict[float, Group], colour: str, name: str, style: str, index: int) -> None:
    """Means over seeds with their standard deviations."""
    xs = sorted(points)
    means, deviations = [100 * points[x].mean for x in xs], [100 * (points[x].std or 0.0) for x in xs]
    shape = {"linestyle": style, "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "capsize": 2}
    axis.errorbar([100 * x for x in xs], means, deviations, color=colour, label=name, **shape)


def finish(axis: Any, section: Section) -> None:
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(section.title, fontsize=10)
    legend_below(axis, -0.2)


def shown(section: Section) -> list[Group]:
    """What the plots of a task show: per model the main budget, from scratch and pretrained."""
    pairs = [chosen(section, model, pretrained) for model in models_of([section]) for pretrained in (False, True)]
    return [g for g in pairs if g is not None]


def draw_accuracies(axis: Any, section: Section, colours: dict[str, str]) -> None:
    """A pair of bars per model, from scratch and pretrained; a dot per seed, a dashed line per reference."""
    models = models_of([section])
    for g in shown(section):
        at = models.index(g.model) + (0.2 if g.pretrained else -0.2)
        axis.bar(at, 100 * g.mean, 0.37, color=colours[g.model], alpha=0.9 if g.pretrained else 0.45)
        if len(g.accuracies) > 1:
            axis.plot([at] * len(g.accuracies), [100 * a for a in g.accuracies], "k.", markersize=4)
        top = 100 * max(g.accuracies) + 1.5
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        size = 9 if len(models) <= 5 else 7
        axis.annotate(f"{100 * g.mean:.1f}", (at, top), ha="center", fontsize=size, weight="bold", bbox=box, zorder=5)
    turned = {"rotation": 30, "ha": "right"} if len(models) > 4 else {}
    axis.set_xticks(range(len(models)), [m.replace(" (", "\n(") for m in models], fontsize=8, **turned)
    end = len(models) - 0.4
    heights = spread([100 * v for v in section.lines.values()], 4.0)
    for (name, value), height in zip(section.lines.items(), heights, strict=True):
        axis.axhline(100 * value, color="0.35", linestyle="--", linewidth=0.8)
        axis.annotate(
            f"{name} {100 * value:.1f}",
            (end, 100 * value),
            xytext=(end + 0.05 * len(models), height),
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
        )
    axis.set_xlim(-0.6, end)
    axis.set_ylim(0, 104)
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(f"{section.title}: pale from scratch, solid pretrained", fontsize=10)


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
    for g in shown(section):
        for i, result in enumerate(g.results):
            spent = result.get("pretrain", {}).get("steps", 0)
            steps = [spent + row["step"] for row in result["curve"]]
            values = [100 * row[f"val_{result['metric']}"] for row in result["curve"]]
            style, name = "-" if spent else ":", f"{g.model}, {g.regime}" if i == 0 else None
            axis.plot(steps, values, style, color=colours[g.model], label=name)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("steps, pretraining included")
    axis.set_ylabel("validation accuracy (%)")
    axis.set_title("training on labels", fontsize=10)
    legend_below(axis)


def draw_pretraining(axis: Any, section: Section, colours: dict[str, str]) -> None:
    """The denoising score on the validation inputs, in the metric of the pretraining."""
    metrics: dict[str, None] = {}
    drawn: set[str] = set()
    for g in shown(section):
        for result in (r for r in g.results if "pretrain" in r):
            before = result["pretrain"]
            metrics[metric := before["metric"]] = None
            values = [(1 if metric == "r2" else 100) * row[f"val_{metric}"] for row in before["curve"]]
            name = None if g.model in drawn else g.model
            axis.plot([row["step"] for row in before["curve"]], values, "-", color=colours[g.model], label=name)
            drawn.add(g.model)
    axis.set_title("pretraining" if drawn else "no pretraining in these results", fontsize=10)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("steps")
    hidden = "hidden" if section.direction == "bidirectional" else "next"
    axis.set_ylabel(f"validation {' and '.join(SCORES[m] for m in metrics) or 'score'}, {hidden} positions")
    if drawn:
        legend_below(axis)


def legend_below(axis: Any, at: float = -0.13) -> None:
    names = axis.get_legend_handles_labels()[1]
    size, columns = (6, 3) if len(names) > 10 else (8, 2)
    axis.legend(fontsize=size, frameon=False, loc="upper center", bbox_to_anchor=(0.5, at), ncols=columns)
