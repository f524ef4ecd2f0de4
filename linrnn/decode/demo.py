"""One text, one attention model, five memories: equal logits, and what each costs.

python -m linrnn.decode.demo                     # under a minute on a CPU
python -m linrnn.decode.demo --length 128 --layers 3 --block-size 16
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from linrnn.decode._job import Choice, Job
from linrnn.decode.attention import AttentionDecoder
from linrnn.decode.calibration import Calibration
from linrnn.decode.live import LiveBytes
from linrnn.decode.plan import aligned, show_bytes, show_count, show_seconds
from linrnn.models.language import LanguageModel

TEXT = (
    "Refuse every cache: the keys and values of a layer are functions of the layer below at earlier tokens, and those "
    "are running sums again. What is left is one frame for each layer, whatever the length, and a lot of arithmetic. "
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status: 1 if two memories disagree."""
    options = parse(arguments)
    torch.manual_seed(options.seed)
    model = LanguageModel(
        256, mixer="attention", d_model=options.d_model, n_layers=options.layers, mixer_kwargs=options.attention
    )
    model = model.to(getattr(torch, options.dtype)).eval()
    print(
        f"{options.layers} layers of softmax attention, {options.d_model} wide, {options.dtype}, random weights,\n"
        f"reading {options.length} bytes of text one by one and predicting the next behind each.\n"
        "Measuring what one block costs ...",
        flush=True,
    )
    job = Job(Calibration(model), 1, options.length)
    choices: list[Choice] = []
    expected = 0.0
    for memory in ("kv", "inputs", "layerwise", "block", "constant"):
        choices.append(job.choice(memory, 1 if memory == "constant" else options.block_size))
        expected += choices[-1].seconds
        if expected > options.time_limit:
            break  # the others come on top: no need to count what they would evaluate
    print(f"Expected to take {show_seconds(expected)}{' or more' if len(choices) < 5 else ''} in all.\n", flush=True)
    if expected > options.time_limit:
        slowest = max(choices, key=lambda choice: choice.seconds)
        print(
            f"error: that is more than --time-limit {options.time_limit:g} s. {slowest.memory!r} evaluates "
            f"{show_count(sum(slowest.evaluations))} blocks: take a smaller --length or --layers",
            file=sys.stderr,
        )
        return 2
    return report(model, bytes_of(options.text, options.length), choices)


def report(model: LanguageModel, ids: Tensor, choices: list[Choice]) -> int:
    """Decodes with every choice and prints the table."""
    rows: list[tuple[str, ...]] = [
        ("memory", "block", "state", "predicted", "peak", "evaluations", "predicted", "time", "predicted", "difference")
    ]
    baseline: Tensor | None = None
    largest = 0.0
    for choice in choices:
        logits, seconds, decoder = decode(model, ids, choice)
        baseline = logits if baseline is None else baseline
        difference = (logits - baseline).abs().max().item()
        largest = max(largest, difference)
        with LiveBytes() as live:  # once more, in one call: watching takes time
            watched = decoder_of(model, choice)
            watched.extend(ids)
        rows.append(
            (
                choice.memory,
                str(choice.block_size),
                show_bytes(decoder.state_bytes),
                show_bytes(choice.state_bytes),
                show_bytes(live.peak),
                show_count(sum(decoder.evaluations)),
                show_count(sum(choice.evaluations)),
                show_seconds(seconds),
                show_seconds(choice.seconds),
                "-" if choice is choices[0] else f"{difference:.1e}",
            )
        )
        print(f"{choice.memory}: {show_seconds(seconds)}", flush=True)
    tolerance = 1e-10 if baseline is not None and baseline.dtype == torch.float64 else 1e-3
    print(f"\n{aligned(rows)}\n")
    print(
        "state: bytes held from token to token, or in the frames of a recursion (token ids come on top where they are\n"
        "read again, 8 bytes each). peak: all that is allocated for the logits behind the last token, in one call.\n"
        "evaluations: of a layer, or the embedding, on a block of tokens. difference: of the logits, from those of kv."
    )
    if largest > tolerance:
        print(f"error: the logits differ by {largest:.1e}, more than {tolerance:.0e}", file=sys.stderr)
        return 1
    print(f"Equal logits at all {ids.shape[1]} places, to {largest:.1e}.")
    return 0


def decode(model: LanguageModel, ids: Tensor, choice: Choice) -> tuple[Tensor, float, AttentionDecoder]:
    """Reads ids (1, T) one by one: logits (T, V), seconds, and the decoder with its counts."""
    decoder = decoder_of(model, choice)
    start = time.perf_counter()
    logits = torch.cat([decoder.step(ids[:, t]) for t in range(ids.shape[1])])
    return logits, time.perf_counter() - start, decoder


def decoder_of(model: LanguageModel, choice: Choice) -> AttentionDecoder:
    return AttentionDecoder(model, memory=choice.memory, block_size=choice.block_size)


def bytes_of(path: Path | None, length: int) -> Tensor:
    """Returns the first bytes of a file, or of the text above, repeated as often as needed: ids (1, length)."""
    if path is None:
        data = TEXT.encode()
    else:
        with path.open("rb") as file:
            data = file.read(length)
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return ids.repeat(-(-length // len(ids)))[:length][None]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; leaves with status 2 and a message where an option makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m linrnn.decode.demo",
        description="Decodes one text with five memories: equal logits, and what each costs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--length", type=int, default=40, help="tokens (bytes) to read")
    parser.add_argument("--layers", type=int, default=2, help="attention layers; work grows as length^(layers + 1)")
    parser.add_argument("--d-model", type=int, default=64, help="width, a multiple of 16")
    parser.add_argument("--block-size", type=int, default=8, help="tokens evaluated together (constant: one)")
    parser.add_argument("--positions", default="rope", choices=("rope", "alibi", "nope"), help="what attention knows")
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values, fewer than heads for grouped queries")
    parser.add_argument("--window", type=int, help="tokens that attention sees; all of them if not given")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"), help="of weights and states")
    parser.add_argument("--text", type=Path, help="a file to read; a sentence of its own if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds; more is refused before it starts")
    options = parser.parse_args(arguments)
    for name in ("length", "layers", "block_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected an integer >= 1, got {getattr(options, name)}")
    if not options.time_limit > 0:  # nan too
        parser.error(f"--time-limit: expected seconds > 0, got {options.time_limit}")
    if not -(2**63) <= options.seed < 2**64:
        parser.error(f"--seed: expected an integer from -2^63 to 2^64 - 1, got {options.seed}")
    if options.text is not None and not (options.text.is_file() and options.text.stat().st_size):
        parser.error(f"--text: expected a file with something in it, got {options.text}")
    options.attention = {"positions": options.positions, "n_kv_heads": options.kv_heads, "window": options.window}
    try:
        LanguageModel(2, mixer="attention", d_model=options.d_model, n_layers=1, mixer_kwargs=options.attention)
    except ValueError as error:
        parser.error(f"--d-model, --kv-heads, --window: {error}")
    return options


if __name__ == "__main__":
    sys.exit(main())
