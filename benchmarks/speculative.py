"""Speculative decoding: tokens a second against `generate`, by acceptance and number of guesses; and ways to roll back.

    python benchmarks/speculative.py               # some minutes; writes benchmarks/results/
    python benchmarks/speculative.py --no-write

No trained pair comes with the library, so a pair is made: a model with new weights, and as its draft its first layers
with the same embedding and head. The smaller the gains of the norms in the layers that the draft lacks, the more
guesses are accepted. What a call costs does not depend on the weights, so the times are those of any pair of these
sizes with this acceptance.
"""

import argparse
import time
from dataclasses import dataclass

import common
import torch

from linrnn.decode import _speculation
from linrnn.decode.generation import generate
from linrnn.decode.speculative import Acceptance, speculative
from linrnn.models import LanguageModel

GAINS = (0.5, 0.3, 0.15)  # of the norms in the layers that the draft lacks
GUESSES = (2, 4, 8)
TAILS = {"read again at once": 1, "tails up to 8": 8, "tails up to 16": 16, "tails up to 32": 32}


@dataclass
class Run:
    """The fastest of some calls, and what was accepted in it."""

    seconds: float
    counts: Acceptance


def pair(mixer: str, d_model: int, n_layers: int, n_kept: int, gain: float) -> tuple[LanguageModel, LanguageModel]:
    """A model, and a draft that is its first layers."""
    torch.manual_seed(0)
    model = LanguageModel(256, mixer=mixer, d_model=d_model, n_layers=n_layers).eval()
    with torch.no_grad():
        for block in model.backbone.blocks[n_kept:]:
            block.mixer_norm.weight *= gain
            block.ffn_norm.weight *= gain
    draft = LanguageModel(256, mixer=mixer, d_model=d_model, n_layers=n_kept).eval()
    draft.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in draft.state_dict()})
    return model, draft


def fastest(model: LanguageModel, draft: LanguageModel, n_tokens: int, n_draft: int, calls: int) -> Run:
    """Decodes one text from an empty one, at temperature 1, with the same seeds every time."""
    prompt, best = torch.tensor([[0]]), None
    for _ in range(calls):
        counts, start = Acceptance(), time.perf_counter()
        out = speculative(model, draft, prompt, n_tokens, n_draft=n_draft, temperature=1.0, seed=0, acceptance=counts)
        seconds = time.perf_counter() - start
        assert out.shape[1] == n_tokens + 1
        best = Run(seconds, counts) if best is None or seconds < best.seconds else best
    assert best is not None
    return best


def plain(model: LanguageModel, n_tokens: int, calls: int) -> float:
    """Seconds of `generate` for the same."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        generate(model, torch.tensor([[0]]), n_tokens, temperature=1.0, seed=0)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def table(mixer: str, args: argparse.Namespace) -> list[str]:
    """Rows of one mixer: acceptance by number of guesses."""
    lines = [
        "| accepted of those judged | guesses | tokens/round | replays/round | tokens/s | of `generate` |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gain in GAINS:
        model, draft = pair(mixer, args.d_model, args.layers, args.kept, gain)
        alone = args.tokens / plain(model, args.tokens, args.calls)
        for n_draft in GUESSES:
            run = fastest(model, draft, args.tokens, n_draft, args.calls)
            counts, rate = run.counts, args.tokens / run.seconds
            lines.append(
                f"| {counts.rate:.0%} | {n_draft} | {counts.tokens_per_round:.2f} | "
                f"{counts.replays / counts.rounds:.2f} | {rate:.1f} | {rate / alone:.2f} |"
            )
            print(mixer, lines[-1], flush=True)
        lines.append(f"| `generate` | | 1 | | {alone:.1f} | 1.00 |")
    return lines


def roll_back(mixer: str, args: argparse.Namespace) -> list[str]:
    """Rows of one mixer: how long accepted tokens may wait until they are read again for good."""
    lines = ["| rolling back | calls/round | tokens/s |", "| --- | ---: | ---: |"]
    model, draft = pair(mixer, args.d_model, args.layers, args.kept, GAINS[1])
    usual = _speculation.LONGEST_TAIL
    for name, tail in TAILS.items():
        _speculation.LONGEST_TAIL = tail
        run = fastest(model, draft, args.tokens, 4, args.calls)
        lines.append(f"| {name} | {run.counts.calls / run.counts.rounds:.2f} | {args.tokens / run.seconds:.1f} |")
        print(mixer, lines[-1], flush=True)
    _speculation.LONGEST_TAIL = usual
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="*", default=["lru", "mamba", "attention"])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kept", type=int, default=1, help="layers of the draft")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--calls", type=int, default=2, help="of each, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common.keep_memory_warm()
    lines = [common.head("Speculative decoding", "linrnn")]
    lines += [
        f"One sequence, {args.tokens} tokens at temperature 1, float32, 256 token ids, D = {args.d_model}: a model of "
        f"{args.layers} layers, and a draft that is the first {args.kept} of them with the same embedding and head. "
        "The norms of the other layers have a gain of " + ", ".join(map(str, GAINS)) + ": that decides the acceptance.",
        "",
    ]
    for mixer in args.mixers:
        lines += [f"## {mixer}", "", *table(mixer, args), "", *roll_back(mixer, args), ""]
    if not args.no_write:
        path = common.RESULTS / f"speculative_cpu_{args.threads}threads.md"
        common.write_whole(path, "\n".join(lines))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
