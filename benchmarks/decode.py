"""Decoding token by token behind a context: models with a state of fixed size beside Transformers with a KV cache.

    pip install -e '.[bench,hf]' && python benchmarks/decode.py       # about ten minutes; writes benchmarks/results/
    python benchmarks/decode.py --size tiny --contexts 16 64 --no-write   # does the script itself work?
    python benchmarks/decode.py --device cuda --dtype bfloat16        # a GPU; ours as a CUDA graph as well

Models of 130M parameters with random weights, one sequence, greedy. Mamba has one set of weights here and in
transformers (exported by `models.export_transformers`), and its first tokens are compared: unequal ones stop the run.
LRU and the Transformers are as large, within 3 %. What is timed is the time between two tokens of each library's own
`generate`, which includes all that it does for a token; the median of a run, the fastest of the runs, which take turns.
The first token of a run is timed for nobody: theirs reads a prompt, ours copies the given cache to where it can grow.

A context of n tokens is a cache of n random keys and values; a state of fixed size is what it is behind any context, so
that nothing has to be read for it. Beside the table stands what torch's matrix-vector products of all weights take.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

from linrnn.decode import GraphedStep
from linrnn.decode import state as states
from linrnn.decode.plan import show_bytes
from linrnn.models import LanguageModel, count_params, export_transformers

CONTEXTS = (128, 1024, 8192, 32768, 65536)
SIZES = {"130m": (50280, 768, 24, 15), "tiny": (512, 64, 3, 2)}  # vocabulary, width, blocks of Mamba, of the others
Intervals = list[float]  # seconds between tokens


@dataclass
class Contestant:
    """A model that decodes: `run(context, n)` times n tokens behind so many, `size(context)` counts bytes of state."""

    name: str
    model: nn.Module
    run: Callable[[int, int], Intervals]
    size: Callable[[int], int]
    ms: dict[int, float] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)


def ours(name: str, model: LanguageModel, graphed: bool = False) -> Contestant:
    def behind(context: int) -> Any:
        prompt = torch.zeros(1, 8, dtype=torch.int64, device=model.embed.weight.device)
        with torch.inference_mode():
            state = model(prompt)[1]
        return state if model.state_size is not None else cached(state, context)

    def run(context: int, n: int) -> Intervals:
        if graphed:
            return intervals(greedy(GraphedStep(model, 1), behind(context), n + 1))
        prompt = torch.ones(1, 1, dtype=torch.int64, device=model.embed.weight.device)
        return intervals(model.generate(prompt, n + 1, state=behind(context), stream=True, graphs=False))

    return Contestant(name, model, run, lambda context: states.nbytes(behind(context)))


def cached(state: Any, context: int) -> Any:
    """An attention model's state behind so many random tokens."""
    return tuple(
        layer._replace(
            k=layer.k.new_empty(1, context, *layer.k.shape[2:]).normal_(),
            v=layer.v.new_empty(1, context, *layer.v.shape[2:]).normal_(),
            position=torch.full_like(layer.position, context),
        )
        for layer in state
    )


def greedy(step: Callable[[Tensor, Any], tuple[Tensor, Any]], state: Any, n: int) -> Iterator[Tensor]:
    ids = torch.ones(1, dtype=torch.int64, device=next(states.leaves(state)).device)
    for _ in range(n):
        logits, state = step(ids, state)
        ids = logits.argmax(-1)
        yield ids


def intervals(tokens: Iterator[Tensor]) -> Intervals:
    """Seconds between tokens as they come out, from the first on: what it takes to start the run is left out."""
    times = []
    for token in tokens:
        token.tolist()  # what a user who prints it waits for
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


class Clock:
    """A streamer of transformers that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.tolist()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def theirs(name: str, model: nn.Module, keeps_cache: bool) -> Contestant:
    from transformers import DynamicCache

    device = next(model.parameters()).device
    config = model.config

    def cache(context: int) -> DynamicCache:
        found = DynamicCache()
        heads = config.num_key_value_heads
        for layer in range(config.num_hidden_layers):
            k, v = torch.randn(2, 1, heads, context, config.hidden_size // config.num_attention_heads, device=device)
            found.update(k.to(model.dtype), v.to(model.dtype), layer)
        return found

    def run(context: int, n: int) -> Intervals:
        clock = Clock()
        ids = torch.ones(1, context + 1 if keeps_cache else 8, dtype=torch.int64, device=device)
        own = {"past_key_values": cache(context)} if keeps_cache else {}
        how = {"max_new_tokens": n + 2, "min_new_tokens": n + 2, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **how, **own)
        # the prompt is put first, then the token of the prefill
        return [b - a for a, b in itertools.pairwise(clock.times[1:])]

    def size(context: int) -> int:
        if keeps_cache:
            heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
            return 2 * context * heads * config.num_hidden_layers * model.dtype.itemsize
        output = model(torch.ones(1, 8, dtype=torch.int64, device=device), use_cache=True)
        layers = output.cache_params.layers
        kept = (part for layer in layers for part in (layer.conv_states, layer.recurrent_states))
        return sum(tensor.nbytes for part in kept for tensor in part.values())

    return Contestant(name, model, run, size)


def contestants(size: str, device: torch.device, dtype: torch.dtype) -> list[Contestant]:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    vocab, width, mamba_blocks, blocks = SIZES[size]
    torch.manual_seed(0)

    def build(n_layers: int, **kwargs: Any) -> LanguageModel:
        model = LanguageModel(vocab, d_model=width, n_layers=n_layers, tie_embeddings=True, **kwargs)
        return model.eval().to(device, dtype)

    mamba = build(mamba_blocks, mixer="mamba", ffn=None, norm_eps=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        export_transformers(mamba, folder)
        same = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    heads = max(4, width // 64)
    config = LlamaConfig(
        **{"vocab_size": vocab, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks},
        **{"num_attention_heads": heads, "max_position_embeddings": 1 << 17, "tie_word_embeddings": True},
        **{"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0},
    )
    llama = LlamaForCausalLM(config).eval().to(device, dtype)
    same.generation_config.eos_token_id = llama.generation_config.eos_token_id = None
    agree(mamba, same, vocab)
    lru = build(blocks, mixer="lru")
    found = [
        ours("linrnn Mamba", mamba),
        theirs("transformers Mamba, the same weights", same, keeps_cache=False),
        ours("linrnn LRU", lru),
        ours("linrnn attention, KV cache", build(blocks, mixer="attention", mixer_kwargs={"n_heads": heads})),
        theirs("transformers Llama, KV cache", llama, keeps_cache=True),
    ]
    if device.type == "cuda":
        found += [ours("linrnn Mamba, CUDA graph", mamba, True), ours("linrnn LRU, CUDA graph", lru, True)]
    return found


def agree(model: LanguageModel, other: nn.Module, vocab: int) -> None:
    """No speed beside other tokens: both generate the same, as far as no two logits are all but equal."""
    ids = torch.randint(vocab, (1, 12), device=model.embed.weight.device)
    a, b = model.generate(ids, 12), other.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    if not torch.equal(a, b) and model.embed.weight.dtype == torch.float32:
        raise SystemExit(f"Mamba generates {a.tolist()} here and {b.tolist()} in transformers")


def floor(model: nn.Module, device: torch.device) -> Callable[[], object]:
    """Matrix-vector products that read as many bytes as the model has, in the same number of pieces."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [torch.randn(p.shape[1], device=device, dtype=p.dtype) for p in matrices]

    def run() -> None:
        for matrix, vector in zip(matrices, vectors, strict=True):
            torch.mv(matrix, vector)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


@torch.inference_mode()
def measure(found: list[Contestant], contexts: list[int], tokens: int, turns: int, device: torch.device) -> float:
    """Fills in milliseconds and bytes; returns the milliseconds of reading Mamba's weights once."""
    read = [common.best_times({"floor": floor(found[0].model, device)}, seconds=0.5)["floor"]]
    for context in contexts:
        best = {c.name: float("inf") for c in found}
        for _ in range(turns):
            for c in found:
                taken = c.run(context, tokens)
                best[c.name] = min(best[c.name], 1e3 * statistics.median(taken))
            read.append(common.best_times({"floor": floor(found[0].model, device)}, seconds=0.5)["floor"])
        for c in found:
            c.ms[context], c.bytes[context] = best[c.name], c.size(context)
            print(f"{context:6} {c.name:40} {c.ms[context]:8.2f} ms {show_bytes(c.bytes[context]):>12}", flush=True)
    return min(read)


def table(found: list[Contestant], contexts: list[int], read: float) -> list[str]:
    columns, rule = " | ".join(f"{n} tokens" for n in contexts), " | ".join("---:" for _ in contexts)
    lines = [
        f"Mamba's weights, as torch's matrix-vector products: {read:.2f} ms, {1e3 / read:.1f} times a second. "
        "(The program of our steps reads them faster: benchmarks/step.py.)",
        "",
        "Tokens per second, and in brackets the bytes of the state:",
        "",
        f"| | parameters | {columns} |",
        f"| --- | ---: | {rule} |",
    ]
    for c in found:
        cells = [f"{1e3 / c.ms[n]:.1f} ({show_bytes(c.bytes[n])})" for n in contexts]
        lines.append(f"| {c.name} | {count_params(c.model) / 1e6:.1f}M | {' | '.join(cells)} |")
    lines += ["", "Ratios to linrnn's Mamba (above 1: more tokens per second):", ""]
    lines += [f"| | {columns} |", f"| --- | {rule} |"]
    lines += [f"| {c.name} | {' | '.join(f'{found[0].ms[n] / c.ms[n]:.2f}' for n in contexts)} |" for c in found[1:]]
    return lines


def plot(found: list[Contestant], contexts: list[int], read: float, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for i, c in enumerate(found):
        style = {"color": f"C{i}", "marker": "o", "linestyle": "--" if c.name.startswith("transformers") else "-"}
        speed.plot(contexts, [1e3 / c.ms[n] for n in contexts], label=c.name, **style)
        memory.plot(contexts, [c.bytes[n] for n in contexts], label=c.name, **style)
    speed.axhline(1e3 / read, color="grey", linewidth=1, label="the weights as products of torch")
    speed.set(xscale="log", xlabel="tokens of context", ylabel="tokens per second", ylim=(0, None), title=title)
    memory.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="bytes of state of one sequence")
    for axes in (speed, memory):
        axes.set_xticks(contexts, [str(n) for n in contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    temporary = path.with_name(path.stem + ".part.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a run")
    parser.add_argument("--turns", type=int, default=3, help="runs of each at each context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the table and the plot")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    common.keep_memory_warm()
    lines = [common.head("Decoding behind a context", "linrnn", "transformers", device=device)]
    found = contestants(args.size, device, getattr(torch, args.dtype))
    read = measure(found, list(args.contexts), args.tokens, args.turns, device)
    lines += [f"One sequence, greedy, {args.dtype}; time between tokens of each library's `generate`.", ""]
    lines += table(found, list(args.contexts), read)
    print("\n".join(lines))
    if not args.no_write:
        name = f"decode_{common.device_slug(device)}" + (f"_{args.threads}threads" if device.type == "cpu" else "")
        common.write_whole(args.out / f"{name}.md", "\n".join(lines) + "\n")
        plot(found, list(args.contexts), read, args.out / f"{name}.png", f"{args.size} models, {args.dtype}")
        print(f"wrote {args.out / name}.md and .png")


if __name__ == "__main__":
    main()
