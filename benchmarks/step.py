"""A step of decoding on a CPU: how near to reading the weights once, and what is spent around the kernels.

    pip install -e '.[bench,hf]' mambapy && python benchmarks/step.py    # a minute; writes benchmarks/results/
    python benchmarks/step.py --size tiny --no-write                     # does the script itself work?

Models of 130M parameters with random weights, one sequence, float32: a Mamba and an LRU as large. The peers' Mambas
have the weights of ours, and their logits are compared first; unequal ones stop the run. The floor is one matrix-vector
product that reads as many bytes, the fastest of three in the same run: the operation that the compiled steps are made
of, `torch.mv` and `F.linear`. All of them take turns, and the fastest turn of each counts. What a layer costs around
the kernels is the time of `frozen_step` less that of its one call of the compiled library, by the number of blocks:
Python, the allocation of the next state, the embedding.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import nn

from linrnn.models import LanguageModel, count_params
from linrnn.ops import step_program
from linrnn.ops.step_program import StepProgram

SIZES = {"130m": (50280, 768, 24, 15), "tiny": (512, 64, 3, 2)}  # vocabulary, width, blocks of Mamba, of the LRU
GOAL, GOAL_US = 0.8, 30.0
Run = Callable[[], object]


def decoding(model: LanguageModel, frozen: bool) -> Run:
    step, ids = model.frozen_step() if frozen else model.step, torch.ones(1, dtype=torch.int64)
    held = [model.init_state(1)]

    def run() -> None:
        _, held[0] = step(ids, held[0])

    return run


def products(n_bytes: int, width: int) -> dict[str, Run]:
    """Matrix-vector products that read so many bytes."""
    weight = torch.randn(n_bytes // 4 // width, width)
    x = torch.randn(1, width)
    program = StepProgram(width, len(weight))
    program.linear(program.x, weight, out=program.y)
    call = program.function()
    torch.testing.assert_close(call(x, [])[0], F.linear(x, weight), rtol=1e-4, atol=1e-3)
    return {
        "StepProgram.linear": lambda: call(x, []),
        "torch.mv": lambda: torch.mv(weight, x[0]),
        "F.linear": lambda: F.linear(x, weight),
    }


def peers(model: LanguageModel) -> dict[str, Run]:
    """The Mambas of transformers and mambapy with the weights of ours, one token a call; their logits are ours."""
    from mambapy.mamba import Mamba as Mambapy  # its language model needs mamba-ssm
    from mambapy.mamba import MambaConfig as MambapyConfig
    from transformers import MambaConfig, MambaForCausalLM

    width, n_layers, vocab = model.backbone.d_model, len(model.backbone.blocks), model.vocab_size
    eps: Any = model.backbone.norm.eps
    shape = {"hidden_size": width, "num_hidden_layers": n_layers, "state_size": 16, "layer_norm_epsilon": eps}
    theirs = MambaForCausalLM(MambaConfig(vocab_size=vocab, tie_word_embeddings=True, **shape)).eval()
    other = Mambapy(MambapyConfig(d_model=width, n_layers=n_layers, rms_norm_eps=eps)).eval()
    for i, block in enumerate(model.backbone.blocks):
        for layer in (theirs.backbone.layers[i], other.layers[i]):
            weights = {k: v[:, None] if k == "conv1d.weight" else v for k, v in block.mixer.state_dict().items()}
            layer.mixer.load_state_dict(weights)
            layer.norm.weight.copy_(block.mixer_norm.weight)
    theirs.backbone.embeddings.weight.copy_(model.embed.weight)
    theirs.backbone.norm_f.weight.copy_(model.backbone.norm.weight)

    inner, ids = 2 * width, torch.ones(1, dtype=torch.int64)
    output = theirs(ids[:, None], use_cache=True)
    caches = [[(None, torch.zeros(1, inner, 3)) for _ in range(n_layers)]]

    def step_theirs() -> torch.Tensor:
        return theirs(ids[:, None], cache_params=output.cache_params, use_cache=True).logits[:, 0]

    def step_other() -> torch.Tensor:
        x, caches[0] = other.step(model.embed(ids), caches[0])
        return model.read_out(model.backbone.norm(x))

    # both have read the first token when they are asked for the second
    step, state = model.frozen_step(), model.init_state(1)
    step_other()
    for _ in range(2):
        logits, state = step(ids, state)
    for name, peer in (("transformers", step_theirs), ("mambapy", step_other)):
        error = (peer() - logits).abs().max().item()
        if not error < 1e-3 * logits.abs().max().item():
            raise SystemExit(f"{name} has other logits: they differ by {error:.2g}")
    return {"transformers Mamba, the same weights": step_theirs, "mambapy, the same weights": step_other}


def outside(run: Run, n_layers: int, seconds: float) -> float:
    """Microseconds a block of the fastest step that are not spent in the compiled library."""
    launch, inside, best = step_program.run, [0.0], float("inf")

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        launch(*args)
        inside[0] += time.perf_counter() - start

    step_program.run = timed
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            inside[0], start = 0.0, time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start - inside[0])
    finally:
        step_program.run = launch
    return 1e6 * best / n_layers


@torch.inference_mode()
def measure(size: str, seconds: float) -> list[str]:
    vocab, width, mamba_blocks, lru_blocks = SIZES[size]
    torch.manual_seed(0)
    mamba, lru = (
        LanguageModel(vocab, d_model=width, n_layers=n, tie_embeddings=True, norm_eps=1e-5, **kwargs).eval()
        for n, kwargs in ((mamba_blocks, {"mixer": "mamba", "ffn": None}), (lru_blocks, {"mixer": "lru"}))
    )
    ours = {"linrnn Mamba": mamba, "linrnn LRU": lru}
    n_bytes = {name: 4 * count_params(model) for name, model in ours.items()}
    runs = {f"{name}, frozen_step": decoding(model, True) for name, model in ours.items()}
    runs |= {f"{name}, step": decoding(model, False) for name, model in ours.items()}
    runs |= peers(mamba)
    reads = products(n_bytes["linrnn Mamba"], width)
    ms = common.best_times(runs | reads, seconds, most=1000)
    fastest = min(reads, key=lambda name: ms[name])
    lines = [
        f"Reading {n_bytes['linrnn Mamba'] / 1e6:.0f} MB once, as one matrix-vector product:",
        "",
        "| | ms | GB/s |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {ms[name]:.2f} | {n_bytes['linrnn Mamba'] / ms[name] / 1e6:.1f} |" for name in reads),
        "",
        f"A step, and the share of the rate that {fastest} allows for the weights of the model:",
        "",
        "| | parameters | ms per token | tokens per second | share | around the kernels, us per block |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    verdicts = []
    for name in runs:
        model_name = next((own for own in ours if name.startswith(own)), "linrnn Mamba")
        model: nn.Module = ours[model_name]
        share = ms[fastest] * n_bytes[model_name] / n_bytes["linrnn Mamba"] / ms[name]
        around = "-"
        if name.endswith("frozen_step"):
            us = outside(runs[name], len(ours[model_name].backbone.blocks), seconds)
            around = f"{us:.1f}"
            verdicts.append(f"- {'met' if share >= GOAL else 'MISSED'}: {model_name}, share {share:.2f} (goal {GOAL})")
            verdicts.append(f"- {'met' if us <= GOAL_US else 'MISSED'}: {model_name}, {us:.1f} us (goal {GOAL_US:.0f})")
        lines.append(
            f"| {name} | {count_params(model) / 1e6:.1f}M | {ms[name]:.2f} | {1e3 / ms[name]:.1f} | {share:.2f} | "
            f"{around} |"
        )
    return [*lines, "", *verdicts]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="130m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the table")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common.keep_memory_warm()
    head = common.head("A step of decoding", "linrnn", "transformers", "mambapy")
    text = "\n".join([head, "Batch 1, float32.", "", *measure(args.size, args.seconds)]) + "\n"
    print(text)
    if not args.no_write:
        common.write_whole(args.out / f"step_cpu_{args.threads}threads.md", text)


if __name__ == "__main__":
    main()
