"""Table and plot of the results in a folder."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from byte_language_model.mixers import LABELS
from byte_language_model.settings import options
from byte_language_model.training import replacing

CLAIM = ("gau", "attention", "token_mix", "lru", "slru")  # best first: kexue.fm 9554
COLORS = dict(zip(LABELS, ("tab:blue", "tab:orange", "tab:green", "tab:olive", "tab:red", "tab:purple"), strict=True))
Result = dict[str, Any]
Group = dict[tuple[str, int], list[Result]]  # results of a mixer at a length, by seed


def read(folder: Path) -> list[Result]:
    """The results of a folder.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of different settings or texts.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise FileNotFoundError(f"{folder}: no results there; `train` writes them")
    for key in ("settings", "corpus"):
        if any(result[key] != results[0][key] for result in results):
            raise ValueError(f"{folder}: results of different {key} cannot be compared; take a folder for each")
    return results


def write(folder: Path, target: Path) -> None:
    """Writes target.md and target.png."""
    done = read(folder)
    results = whole_seeds(done)
    trials = [json.loads(path.read_text()) for path in sorted((folder / "rates").glob("*.json"))]
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target.with_suffix(".md")) as temporary:
        temporary.write_text(table(results, trials, unfinished(done, trials), target.with_suffix(".png").name))
    plot(results, target.with_suffix(".png"))
    print(f"wrote {target.with_suffix('.md')} and {target.with_suffix('.png')}")


def whole_seeds(results: Sequence[Result]) -> list[Result]:
    """Without the seeds that are not done yet: means over different seeds would not compare mixers."""
    cells = {(result["cell"]["mixer"], result["cell"]["length"]) for result in results}
    done = [result["cell"]["seed"] for result in results]
    whole = [seed for seed in set(done) if done.count(seed) == len(cells)]
    return [result for result in results if result["cell"]["seed"] in whole] if whole else list(results)


def unfinished(results: Sequence[Result], trials: Sequence[Result]) -> list[str]:
    """A line for every seed that has not all cells: of the mixers in the folder, at every window of the settings."""
    seeds = [result["cell"]["seed"] for result in results]
    used = {result["cell"]["seed"] for result in whole_seeds(results)}
    whole = len({result["cell"]["mixer"] for result in (*results, *trials)}) * len(results[0]["settings"]["lengths"])
    return [
        f"- **seed {seed} is not whole:** {seeds.count(seed)} of {whole} cells are done"
        + ("" if seed in used else "; it is left out here")
        for seed in sorted(set(seeds))
        if seeds.count(seed) < whole
    ]


def grouped(results: Sequence[Result]) -> Group:
    groups: Group = defaultdict(list)
    for result in sorted(results, key=lambda result: result["cell"]["seed"]):
        groups[result["cell"]["mixer"], result["cell"]["length"]].append(result)
    return dict(groups)


def order(groups: Group) -> list[str]:
    """The mixers, best first at the longest length that all of them have."""
    names = [name for name in LABELS if any(mixer == name for mixer, _ in groups)]
    common = [length for length in lengths(groups) if all((name, length) in groups for name in names)]
    return sorted(names, key=lambda name: mean(groups[name, common[-1]], "test")) if common else names


def lengths(groups: Group) -> list[int]:
    return sorted({length for _, length in groups})


def mean(results: Sequence[Result], key: str) -> float:
    return statistics.fmean(result[key] for result in results)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation (n)."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation} ({len(values)})"


def table(results: Sequence[Result], trials: Sequence[Result], notes: Sequence[str], picture: str) -> str:
    groups, first = grouped(results), results[0]
    mixers = order(groups)
    lines = [*head(results, trials), *notes, "", f"![Loss against bytes, window and position]({picture})", ""]
    lines += ["## Bits per byte on the test files", ""]
    lines += ["Mean ± standard deviation over seeds (their number).", ""]
    windows = lengths(groups)
    change = f" {windows[0]} to {windows[-1]} |" if len(windows) > 1 else ""
    lines += [f"| mixer | parameters | rate |{''.join(f' window {n} |' for n in windows)}{change}"]
    lines += [f"| --- | ---: | ---: |{' ---: |' * (len(windows) + bool(change))}"]
    for name in mixers:
        some = next(groups[name, n][0] for n in windows if (name, n) in groups)
        cells = [LABELS[name], f"{some['parameters']:,}", f"{some['cell']['rate']:g}"]
        cells += [spread([r["test"] for r in groups[name, n]]) if (name, n) in groups else "-" for n in windows]
        if change:
            values = differences(groups, (name, windows[-1]), (name, windows[0]))
            cells.append(spread(values, "+") if values else "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Byte frequencies of the training files alone: {first['unigram']:.3f}.", "", *claim(groups)]
    for length in windows:
        lines += by_position(groups, [name for name in mixers if (name, length) in groups], length)
    lines += rates(trials, mixers)
    return "\n".join([*lines, ""])


def head(results: Sequence[Result], trials: Sequence[Result]) -> list[str]:
    """What was run, on what, with what."""
    first = results[0]
    settings, corpus = first["settings"], first["corpus"]
    versions = {", ".join(f"{name} {version}" for name, version in r["versions"].items()) for r in results}
    parts = "; ".join(
        f"{part}: {corpus[part]['documents']:,} documents, {corpus[part]['bytes']:,} bytes"
        for part in ("train", "validation", "test")
    )
    one = first["cell"]["bytes"]
    repeated = f"; {first['repeated']:.1%} of the long lines of test stand in train" if "repeated" in first else ""
    hours = sum(result["seconds"] for result in (*results, *trials)) / 3600
    return [
        "# Byte-level language models",
        "",
        f"- machine: {'; '.join(sorted({result['machine'] for result in results}))}",
        f"- versions: {'; '.join(sorted(versions))}; commit {', '.join(sorted({r['commit'] for r in results}))}",
        *command(results),
        f"- settings: {', '.join(f'{name} {value}' for name, value in settings.items())}",
        f"- text: {parts}; fingerprint {corpus['fingerprint']}{repeated}",
        f"- every cell: {one:,} bytes ({one / corpus['train']['bytes']:.2f} of the training text), AdamW, cosine rate; "
        f"{hours:.1f} hours of training, the trials of rates among them",
    ]


def command(results: Sequence[Result]) -> list[str]:
    """The line with the command for these results, where the presets of today have such settings."""
    line = options(results[0]["settings"])
    if line is None:
        return []
    names = {result["cell"]["mixer"] for result in results}
    some = f" --mixers {' '.join(name for name in LABELS if name in names)}" if len(names) < len(LABELS) else ""
    seeds = max(result["cell"]["seed"] for result in results) + 1
    return [f"- command: `python examples/byte_lm.py train {line}{some} --seeds {seeds}` on the text below"]


def differences(groups: Group, one: tuple[str, int], other: tuple[str, int]) -> list[float]:
    """Test bits of `one` minus those of `other`, seed by seed."""
    first, second = ({r["cell"]["seed"]: r["test"] for r in groups.get(key, [])} for key in (one, other))
    return [first[seed] - second[seed] for seed in first if seed in second]


def claim(groups: Group) -> list[str]:
    """Whether each neighbour in the claimed ranking is better than the next, seed by seed."""
    windows = lengths(groups)
    lines = ["## The ranking", "", f"Claimed, better > worse: {ranking(CLAIM)}.", ""]
    for n in windows:
        seen = sorted((name for name in LABELS if (name, n) in groups), key=lambda name: mean(groups[name, n], "test"))
        lines += [f"- Seen at window {n}: {distances(groups, seen, n)}."] if len(seen) > 1 else []
    lines += [
        "",
        "Behind each its distance to the one before it, mean ± standard deviation of the differences seed by seed;",
    ]
    lines += ["≈ in place of > where that mean is no larger than the deviation or where there is one seed only."]
    lines += ["", "Pairs of the claim: bits of the second minus bits of the first, mean ± standard deviation (seeds),"]
    lines += ["and in how many seeds the first is better.", ""]
    lines += [f"| pair |{''.join(f' window {n} |' for n in windows)}", f"| --- |{' ---: |' * len(windows)}"]
    for better, worse in pairwise(CLAIM):
        cells = [f"{LABELS[better]} > {LABELS[worse]}"]
        for n in windows:
            values = differences(groups, (worse, n), (better, n))
            held = sum(value > 0 for value in values)
            cells.append(f"{spread(values, '+')}, {held} of {len(values)}" if values else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def ranking(names: Sequence[str]) -> str:
    return " > ".join(LABELS[name] for name in names)


def distances(groups: Group, names: Sequence[str], length: int) -> str:
    """A ranking with the distance of each to the one before it, and marks for those that the spread does not part."""
    text = LABELS[names[0]]
    for better, worse in pairwise(names):
        values = differences(groups, (worse, length), (better, length))
        apart = len(values) > 1 and statistics.fmean(values) > statistics.stdev(values)
        text += f" {'>' if apart else '≈'} {LABELS[worse]} {spread(values, '+') if values else ''}".rstrip()
    return text


def bins(length: int) -> list[tuple[int, int]]:
    """Positions 0 to 7, then up to the next power of two each."""
    edges = [0, *(2**k for k in range(3, length.bit_length()) if 2**k < length), length]
    return list(pairwise(edges))


def by_position(groups: Group, mixers: Sequence[str], length: int) -> list[str]:
    """A table of the losses by the number of bytes that the model has seen before, mean over seeds."""
    parts = bins(length)
    lines = [f"## By position, window {length}", ""]
    lines += [f"| mixer |{''.join(f' {a} to {b - 1} |' for a, b in parts)}", f"| --- |{' ---: |' * len(parts)}"]
    for name in mixers:
        curve = position_curve(groups[name, length])
        lines.append(f"| {LABELS[name]} |{''.join(f' {statistics.fmean(curve[a:b]):.3f} |' for a, b in parts)}")
    return [*lines, ""]


def position_curve(results: Sequence[Result]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(result["by_position"] for result in results), strict=True)]


def rates(trials: Sequence[Result], mixers: Sequence[str]) -> list[str]:
    """A table of validation bits by learning rate."""
    if not trials:
        return []
    tried = sorted({result["cell"]["rate"] for result in trials})
    cell = trials[0]["cell"]
    lines = ["## Learning rates", "", f"Bits per byte on validation files after {cell['bytes']:,} bytes in windows of"]
    lines += [f"{cell['length']}, seed {cell['seed']}; the best is what the cells of all seeds and lengths use.", ""]
    best = {}
    lines += [f"| mixer |{''.join(f' {rate:g} |' for rate in tried)}", f"| --- |{' ---: |' * len(tried)}"]
    for name in mixers:
        bits = {r["cell"]["rate"]: r["curve"][-1][-1] for r in trials if r["cell"]["mixer"] == name}
        lines.append(f"| {LABELS[name]} |{''.join(f' {bits[r]:.3f} |' if r in bits else ' - |' for r in tried)}")
        best[name] = min(bits, key=bits.__getitem__, default=None)
    for edge, word in ((tried[-1], "largest"), (tried[0], "smallest")):
        at = ", ".join(LABELS[name] for name, rate in best.items() if rate == edge)
        lines += ["", f"Best at the {word} rate that was tried, so perhaps better still beyond it: {at}."] if at else []
    return lines


def plot(results: Sequence[Result], path: Path) -> None:
    """Loss against bytes, against the length of the window, and against the position in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = grouped(results)
    longest = lengths(groups)[-1]
    parts = bins(longest)[1:] or bins(longest)  # the first, far above the others, would press them together
    edges = [b for _, b in parts]
    figure, (tokens, length, position) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name in order(groups):
        style = {"color": COLORS[name], "label": LABELS[name]}
        if (name, longest) in groups:
            cells = groups[name, longest]
            points = list(zip(*(result["curve"] for result in cells), strict=True))
            tokens.plot(
                [point[0][0] / 1e6 for point in points],
                [statistics.fmean(seed[2] for seed in point) for point in points],
                marker=".",
                **style,
            )
            curve = position_curve(cells)
            position.plot(edges, [statistics.fmean(curve[a:b]) for a, b in parts], marker=".", **style)
        windows = [n for n in lengths(groups) if (name, n) in groups]
        length.plot(windows, [mean(groups[name, n], "test") for n in windows], **style)
        for n in windows:
            length.plot([n] * len(groups[name, n]), [r["test"] for r in groups[name, n]], ".", color=COLORS[name])
    tokens.set(xlabel=f"million bytes read, window {longest}", ylabel="bits per byte, validation files")
    length.set(xlabel="window in training and test", ylabel="bits per byte, test files", xscale="log")
    length.set_xticks(lengths(groups), [str(n) for n in lengths(groups)], minor=False)
    length.set_xticks([], minor=True)
    position.set(xlabel=f"position up to, window {longest}", ylabel="bits per byte, test files", xscale="log")
    position.set_xticks(edges, [str(edge) for edge in edges], minor=False)
    position.set_xticks([], minor=True)
    for axes in (tokens, length, position):
        axes.grid(alpha=0.3)
    tokens.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
