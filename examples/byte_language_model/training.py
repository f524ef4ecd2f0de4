"""One cell of the comparison: a model trained on so many bytes, its losses written to a file when it is done."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linrnn
from byte_language_model import corpus as texts
from byte_language_model import mixers
from byte_language_model.settings import Settings
from linrnn.models import count_params, param_groups

BITS = 1 / math.log(2)


class DivergedError(RuntimeError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    mixer: str
    length: int
    seed: int
    rate: float
    bytes: int

    @property
    def name(self) -> str:
        return f"{self.mixer}-{self.length}-seed{self.seed}"


def run(cell: Cell, settings: Settings, corpus: texts.Corpus, path: Path, **options: Any) -> dict[str, Any]:
    """Returns the result in the file `path`; trains first if there is none.

    Raises:
        ValueError: the file, or the checkpoint beside it, is of other settings or of another text.
        DivergedError: the loss is not finite.
    """
    if path.exists():
        result = json.loads(path.read_text())
        check_same(identity(cell, settings, corpus), result, path)
        return result
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {**identity(cell, settings, corpus), **train(cell, settings, corpus, path, **options), **environment()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result))
    path.with_suffix(".ckpt").unlink(missing_ok=True)
    return result


def identity(cell: Cell, settings: Settings, corpus: texts.Corpus) -> dict[str, Any]:
    """What a result or a checkpoint belongs to, as JSON holds it."""
    whole = {"cell": asdict(cell), "settings": asdict(settings), "corpus": corpus.describe()}
    return json.loads(json.dumps(whole))


def check_same(expected: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    other = [key for key, value in expected.items() if found.get(key) != value]
    if other:
        raise ValueError(f"{path}: belongs to another {', '.join(other)}; take another --out or remove it")


def train(
    cell: Cell,
    settings: Settings,
    corpus: texts.Corpus,
    path: Path,
    *,
    device: str = "cpu",
    trial: bool = False,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains one model; its checkpoint and, at the end, its weights lie beside `path`. A trial sees no test file."""
    torch.manual_seed(cell.seed)
    model = mixers.build(cell.mixer, settings.d_model, settings.n_layers).to(device)
    optimizer = torch.optim.AdamW(param_groups(model, cell.rate, settings.weight_decay), betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    call = torch.compile(model) if settings.compile else model
    precision = torch.autocast(torch.device(device).type, torch.bfloat16) if settings.autocast else nullcontext()

    longest, steps = settings.longest, cell.bytes // settings.batch_bytes
    chunks = settings.batch_bytes // longest
    marks = {round(steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
    validation = texts.held_out_chunks(corpus.validation, settings.validation_bytes, longest)
    checkpoint, owner = path.with_suffix(".ckpt"), identity(cell, settings, corpus)
    # the curve: bytes, bits per byte in training since the point before, bits per byte on validation
    first, seconds, curve, summed = load_checkpoint(checkpoint, model, optimizer, owner)
    losses = torch.tensor(summed, device=device)
    began = saved = time.perf_counter()
    for step in range(first, steps):
        inputs, targets = texts.windows(
            texts.training_batch(corpus.train, cell.seed, step, chunks, longest).to(device), cell.length
        )
        scale = min(1.0, (step + 1) / (settings.warmup * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale
        with precision:
            logits, _ = call(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        losses += torch.stack((loss.detach(), torch.ones_like(loss)))
        now = time.perf_counter()
        if step + 1 in marks:
            trained = float(losses[0] / losses[1]) * BITS
            seen = float(bits(call, validation, cell.length, chunks, device, precision).mean())
            if not math.isfinite(trained + seen):
                raise DivergedError(f"{cell.name}: the loss is not finite after {step + 1} steps at rate {cell.rate:g}")
            curve.append([(step + 1) * settings.batch_bytes, trained, seen])
            losses.zero_()
            speed = (step + 1 - first) * settings.batch_bytes / (now - began)
            progress(f"{(step + 1) / steps:4.0%}  {seen:.3f} bits per byte on validation  {speed:,.0f} bytes/s")
        if now - saved > checkpoint_seconds:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "curve": curve}
            passed = {"seconds": seconds + now - began, "losses": losses.tolist()}
            with replacing(checkpoint) as temporary:
                torch.save({**owner, **state, **passed}, temporary)
            saved = now
    seconds += time.perf_counter() - began
    result = {"parameters": count_params(model), "seconds": seconds, "curve": curve}
    if trial:
        return result
    test = texts.held_out_chunks(corpus.test, settings.test_bytes, longest)
    measured = bits(call, test, cell.length, chunks, device, precision)
    model.save_pretrained(path.with_suffix(""))
    return {
        **result,
        "test": float(measured.mean()),
        "unigram": texts.unigram_bits(corpus, test),
        "repeated": corpus.repeated,
        "by_position": measured.view(-1, cell.length).mean(0).tolist(),
    }


@torch.no_grad()
def bits(model: Callable[[Tensor], Any], chunks: Tensor, length: int, size: int, device: str, precision: Any) -> Tensor:
    """Bits that each byte behind the first costs, (chunks, longest) float64, read in windows of `length`."""
    found = []
    for some in chunks.split(size):
        inputs, targets = texts.windows(some.to(device), length)
        with precision:
            logits, _ = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        found.append(loss.view(len(some), -1).double().cpu() * BITS)
    return torch.cat(found)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, owner: dict[str, Any]
) -> tuple[int, float, list[list[float]], list[float]]:
    """Steps and seconds so far, the curve, and the sum and number of the losses since its last point."""
    if not path.exists():
        return 0, 0.0, [], [0.0, 0.0]
    saved = torch.load(path, weights_only=True)
    check_same(owner, saved, path)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["seconds"], saved["curve"], saved["losses"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` at the end: a file is there whole or not."""
    temporary = path.with_name(path.name + ".part")
    yield temporary
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for a result."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "linrnn": linrnn.__version__},
        "machine": f"{device}, {torch.get_num_threads()} threads",
        "commit": git.stdout.strip() or "unknown",
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
