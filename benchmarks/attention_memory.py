"""Decoding softmax attention with five memories: tokens per second and bytes of state, and the curve between them.

    pip install -e '.[bench]' && python benchmarks/attention_memory.py  # minutes; writes results and docs/
    python benchmarks/attention_memory.py --lengths 128 --no-write           # one length

Each row is one token decoded behind so many: "kv" and "inputs" after a prefill, the others from the token ids alone.
The fastest of a few calls counts. What is predicted to take longer than --limit is not run: its row, and its hollow
point in the curve, are the plan's prediction (`decode.plan`, from the cost of one block on this machine). Logits of all
choices that run are compared with those of "kv"; a benchmark with unequal ones stops.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from torch import Tensor

from linrnn.decode import AttentionDecoder, Calibration, Choice
from linrnn.decode._job import Job
from linrnn.decode.plan import show_bytes, show_count, show_seconds
from linrnn.models import LanguageModel

LENGTHS = (128, 512, 2048, 8192, 16384)
BLOCKS = (16, 64, 256, 1024)
CURVE = Path(__file__).parent.parent / "docs" / "decode_curve.png"


@dataclass
class Row:
    """A choice at a length: what one token is predicted to take and to evaluate, and what it took (None: not run)."""

    length: int
    choice: Choice
    predicted: float
    evaluations: int
    seconds: float | None = None


def measure(model: LanguageModel, calibration: Calibration, length: int, limit: float) -> list[Row]:
    ids = torch.randint(model.vocab_size, (1, length + 64))
    rows, expected = [], None
    page = 256 if length > 256 else 64
    cases = [("kv", page), ("inputs", page), ("layerwise", page)]
    cases += [("block", size) for size in (*(size for size in BLOCKS if size < length), length)]
    for memory, size in [*cases, ("constant", 1)]:
        row = Row(length, *predict(calibration, memory, size, length))
        choice, predicted = row.choice, row.predicted
        rows.append(row)
        if predicted <= limit and choice.bytes < 4 << 30:
            row.seconds, logits = timed(model, memory, size, ids, length, limit)
            expected = logits if expected is None else expected
            error = ((logits - expected).abs().max() / expected.abs().max()).item()
            if not error < 1e-3:
                raise SystemExit(f"{memory} and kv disagree at length {length}: relative error {error:.1e}")
        print(
            f"{length:6} {memory:10} {size:5} {show_seconds(row.seconds) if row.seconds else '-':>10} "
            f"predicted {show_seconds(predicted)}",
            flush=True,
        )
    return rows


def predict(calibration: Calibration, memory: str, size: int, length: int) -> tuple[Choice, float, int]:
    """The plan's choice, and the seconds and evaluations of the last token alone."""
    if memory not in ("kv", "inputs"):  # every call reads everything again
        choice = Job(calibration, length, length).choice(memory, size)
        return choice, choice.seconds, sum(choice.evaluations)
    choice = Job(calibration, length - 1, length).choice(memory, size)
    before = Job(calibration, length - 1, length - 1).choice(memory, size)
    return choice, choice.seconds - before.seconds, sum(choice.evaluations) - sum(before.evaluations)


def timed(model: LanguageModel, memory: str, size: int, ids: Tensor, length: int, limit: float) -> tuple[float, Tensor]:
    """Seconds of decoding token `length`, and its logits."""
    decoder = AttentionDecoder(model, memory=memory, block_size=size)
    cached = memory in ("kv", "inputs")
    if cached:
        decoder.extend(ids[:, : length - 1])
    best, spent, first = float("inf"), 0.0, None
    for turn in range(20):
        if not cached:
            decoder = AttentionDecoder(model, memory=memory, block_size=size)
        at = length - 1 + turn if cached else length - 1
        start = time.perf_counter()
        logits = decoder.step(ids[:, at]) if cached else decoder.extend(ids[:, :length])
        taken = time.perf_counter() - start
        first = logits if first is None else first
        best, spent = min(best, taken), spent + taken
        if spent > min(1.0, limit):
            break
    assert first is not None
    return best, first


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| memory | block | state | state, ids, temporaries | evaluations of a token | tokens/s | predicted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        choice, per_second = row.choice, "not run" if row.seconds is None else f"{1 / row.seconds:.3g}"
        lines.append(
            f"| {choice.memory} | {choice.block_size} | {show_bytes(choice.state_bytes)} | {show_bytes(choice.bytes)} "
            f"| {show_count(row.evaluations)} | {per_second} | {1 / row.predicted:.3g} |"
        )
    return lines


def curve(rows: list[Row], path: Path, title: str) -> None:
    """Seconds of a token against bytes of state: lines are predictions over block sizes, filled points measurements."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    markers = {"kv": "s", "inputs": "^", "layerwise": "D", "block": "o", "constant": "*"}
    for i, length in enumerate(dict.fromkeys(row.length for row in rows)):
        color = f"C{i}"
        own = [row for row in rows if row.length == length]
        line = [row for row in own if row.choice.memory in ("block", "constant")]
        line.sort(key=lambda row: row.choice.state_bytes)
        axes.plot(
            [row.choice.state_bytes for row in line],
            [row.predicted for row in line],
            color=color,
            linewidth=1,
            label=f"{length} tokens",
        )
        for row in own:
            ran = row.seconds is not None
            axes.plot(
                row.choice.state_bytes,
                row.seconds if ran else row.predicted,
                markers[row.choice.memory],
                color=color,
                markerfacecolor=color if ran else "none",
                markersize=11 if row.choice.memory == "constant" else 6,
            )
    for memory, marker in markers.items():
        axes.plot([], [], marker, color="black", label=memory)
    axes.plot([], [], "o", color="black", markerfacecolor="none", label="predicted, not run")
    axes.set(xscale="log", yscale="log", xlabel="bytes of state", ylabel="seconds for one token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    temporary = path.with_name(path.stem + ".part.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, default=15.0, help="seconds for one token; longer ones are predicted only"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common.keep_memory_warm()
    torch.manual_seed(0)
    lines = [common.head("Decoding softmax attention with five memories", "linrnn")]
    model = LanguageModel(256, mixer="attention", d_model=args.d_model, n_layers=args.layers).eval()
    lines += [
        f"{args.layers} layers, D = {args.d_model}, {model.backbone.mixers[0].n_heads} heads, one sequence, float32. "
        "One token decoded behind so many; evaluations are of a layer, or the embedding, on a block of tokens.",
        f"Rows that were not run would take more than {args.limit:g} s for the token.",
        "",
    ]
    calibration, rows = Calibration(model), []
    for length in args.lengths:
        own = measure(model, calibration, length, args.limit)
        rows += own
        lines += [f"## {length} tokens", "", *table(own), ""]
        print("\n".join(lines[-len(own) - 5 :]), flush=True)
    if not args.no_write:
        path = common.RESULTS / f"attention_memory_cpu_{args.threads}threads.md"
        common.write_whole(path, "\n".join(lines))
        curve(rows, CURVE, f"One token of {args.layers} attention layers, D = {args.d_model}")
        print(f"wrote {path} and {CURVE}")


if __name__ == "__main__":
    main()
