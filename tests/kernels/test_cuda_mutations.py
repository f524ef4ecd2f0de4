"""The checks of the CUDA kernels fail when a kernel is broken: one change at a time in a copy of the sources.

Synchronisation: every barrier, commit and wait of the sources, found by their spelling, is removed (and every wait
weakened by one group). Both the race detector and, within 20 orders of threads and arrivals of copies, the results
must show it; none is exempt. The kernels have no fences and no communication between the blocks of a launch, which no
CPU could test; races between blocks are found by "races" (test_cuda_shim.py).
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from .host import SOURCES, CompileError, HostCuda, skip_without_compiler
from .host_scans import BARELY, Case, check, check_long_sum

FLOAT32, COMPLEX64 = (torch.float32,) * 2, (torch.complex64,) * 2
CASES = [
    Case(*kind, plan=plan)
    for kind in (
        (FLOAT32, (2, 37, 10), 3),
        (COMPLEX64, (1, 29, 3), 3),
    )
    for plan in ("segments", "chunks", "panels", "columns")
] + [
    Case(FLOAT32, (1, 65, 6), 1, plan, "reset+mask", reverse=True)
    for plan in ("segments", "chunks", "panels", "columns")
]
SEEDS = 20

# a pattern, and what is put in its place
SYNCHRONISATION = (
    (r"__syncthreads\(\);", lambda m: ""),
    (r"async_commit\(\);", lambda m: ""),
    (r"async_wait<(.*?)>\(\);", lambda m: ""),
    (r"async_wait<(.*?)>\(\);", lambda m: f"async_wait<{m[1]} + 1>();"),
)
# file, what stands there, what is put there
LOGIC = {
    "one buffer of the exchange for two": ("scan.cuh", "turn ^= 1;", ""),
    "a segment enters in the state of its neighbour": ("scan.cuh", "other == int(threadIdx.x)", "other == column"),
    "the gradient of every segment in one place": ("scan.cuh", "pass.finish(segment);", "pass.finish(0);"),
    "a final state without the last tiles": (
        "scan.cuh",
        "if (segments > 1)\n      for",
        "if (segments < 1)\n      for",
    ),
    "a chunk one row short": ("scan.cuh", "least(args.T, begin + args.chunk)", "least(args.T, begin + args.chunk - 1)"),
    "chunks written one over the other": ("scan.cuh", "pass.seek_outputs(chunk * args.chunk);", ""),
    "chunks that start from their own sums": ("scan.cuh", "round_to(s, carry[i * columns]);", ""),
    "the last chunks not carried": ("scan.cuh", "(args.chunks + segments - 1) / segments", "args.chunks / segments"),
    "a chunk's map without its first row": (
        "scan.cuh",
        "compose(pass, k, n, slot, p, q); });",
        "compose(pass, k + 1, n - 1, slot + 1, p, q); });",
    ),
    "a ring shorter for those who fill it": ("stream.cuh", "free + 1 == kStages ?", "free + 1 == kStages - 1 ?"),
    "too few stages ahead": (
        "stream.cuh",
        "stage < kStages - 1; ++stage) fetch()",
        "stage < kStages - 2; ++stage) fetch()",
    ),
    "a reset that keeps the state before it": (
        "diagonal_scan.cu",
        "if (row.flag & RESET) p[v] = Wide{};\n      if (",
        "if (",
    ),
    "padding that decays the gradient": ("diagonal_scan.cu", "row.flag & HOLD ? g : mul", "mul"),
    "no conjugate": ("diagonal_scan.cu", "mul(conj(coefficient(row.a, v)), g)", "mul(coefficient(row.a, v), g)"),
    "the first token without the initial state": ("diagonal_scan.cu", "before.slots[slot + n - 1] = first;", ";"),
}

# what is kept in double, in single precision
PRECISION = {
    "the product over the rows of a piece": (
        "diagonal_scan.cu",
        "p[v] = times(in_double(coefficient(row.a, v)), p[v]);",
        "{ M r; round_to(times(in_double(coefficient(row.a, v)), p[v]), r); p[v] = in_double(r); }",
        "chunks",
    ),
    "the gradient of a constant a": (
        "diagonal_scan.cu",
        "sum[v] = add(sum[v], in_double(factor));",
        "{ M r; round_to(add(sum[v], in_double(factor)), r); sum[v] = in_double(r); }",
        "columns",
    ),
}


def synchronisation() -> Iterator[tuple[str, str, str, str]]:
    """Name, file, text and its replacement, for each place. device.cuh is left out: it defines these functions; and the
    selective scan has its own (test_cuda_selective.py)."""
    for path in sorted(p for p in SOURCES.iterdir() if p.suffix in (".cu", ".cuh") and p.name != "device.cuh"):
        if path.name.startswith("selective"):
            continue
        text = path.read_text()
        for pattern, replacement in SYNCHRONISATION:
            for number, match in enumerate(re.finditer(pattern, text), 1):
                new = text[: match.start()] + replacement(match) + text[match.end() :]
                yield f"{path.name} {match[0]} #{number} -> {replacement(match) or 'nothing'}", path.name, text, new


def copy_with(folder: Path, name: str, text: str) -> Path:
    """The folder of a copy of the sources, one of them replaced."""
    copy = folder / "kernels" / "cuda"
    copy.mkdir(parents=True)
    for path in (*SOURCES.glob("*.cu*"), *SOURCES.parent.glob("*.h")):
        shutil.copy(path, copy.parent / path.relative_to(SOURCES.parent))
    (copy / name).write_text(text)
    return copy


def survives(mode: str, folder: Path, sources: Path) -> bool:
    """Whether all checks pass. A mutant must compile."""
    with HostCuda(mode, folder, sources).installed() as host:
        for case in CASES:
            for seed in range(SEEDS if mode == "fibers" else 1):
                host.seed(100 * seed)
                try:
                    check(case)
                except CompileError:
                    raise
                except (AssertionError, RuntimeError):
                    return False
    return True


@pytest.fixture(autouse=True)
def compiler() -> None:
    skip_without_compiler()


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ("races", "fibers"))
def test_the_sources_as_they_are_survive(mode, host_folder, tmp_path):
    scan = "scan.cuh"
    assert survives(mode, host_folder, copy_with(tmp_path, scan, (SOURCES / scan).read_text()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ("races", "fibers"))
@pytest.mark.parametrize("mutant", list(synchronisation()), ids=lambda mutant: mutant[0])
def test_every_barrier_commit_and_wait_is_needed(mode, mutant, host_folder, tmp_path):
    _, name, _, text = mutant
    assert not survives(mode, host_folder, copy_with(tmp_path, name, text))


def test_all_kinds_of_synchronisation_are_found():
    """The patterns are those of the sources: if the spelling changes, so must the patterns."""
    found = [name for name, *_ in synchronisation()]
    for spelling in ("__syncthreads", "async_commit", "async_wait"):
        assert any(spelling in name for name in found)
    for path in SOURCES.glob("*.cu*"):
        assert path.name == "device.cuh" or not re.search(r"fence|atomic|shfl|syncwarp|barrier\(", path.read_text()), (
            f"{path.name} has synchronisation that no mutation removes"
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LOGIC)
def test_every_error_is_found(name, host_folder, tmp_path):
    file, old, new = LOGIC[name]
    text = (SOURCES / file).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}: adapt the mutation to the source"
    sources = copy_with(tmp_path, file, text.replace(old, new))
    assert not survives("fibers", host_folder, sources) or not survives("races", host_folder, sources)


@pytest.mark.parametrize("name", PRECISION)
def test_single_precision_is_noticed(name, host_folder, tmp_path):
    file, old, new, plan = PRECISION[name]
    text = (SOURCES / file).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}: adapt the mutation to the source"
    with HostCuda("fibers", host_folder, copy_with(tmp_path, file, text.replace(old, new))).installed():
        with pytest.raises(AssertionError, match="is off by"):
            check(replace(BARELY, plan=plan))
            check_long_sum(plan)
