"""The checks of the selective scan's CUDA kernels fail when a kernel is broken: see test_cuda_mutations.py."""

import re
from collections.abc import Iterator

import pytest

from .host import SOURCES, CompileError, HostCuda, skip_without_compiler
from .host_selective import F32, Case, check, make, run, run_backward
from .test_cuda_mutations import SYNCHRONISATION, copy_with

# groups of tokens and stages follow each other, with two warps and padded states, in whole and in chunks of time
BACKWARD = [
    Case((1, 37, 38), 14, x=F32, threads=64, options="reset+mask", seed=3),
    Case((1, 37, 9), 14, x=F32, threads=32, chunk=16, options="reset"),
    Case((1, 37, 9), 14, x=F32, threads=32, chunk=16),
]
FORWARD = [
    Case((1, 70, 38), 14, x=F32, threads=64, options="reset+mask"),
    Case((1, 37, 9), 14, x=F32, threads=32, chunk=16, options="reset"),
]
SEEDS = 6
TILE, BACK, FORE, WHOLE = "selective_scan.cuh", "selective_backward.cuh", "selective_forward.cuh", "selective_scan.cu"
# file, what stands there, what is put there
LOGIC = {
    "a lane keeps what it sends": (TILE, "(upper ? values[i + M / 2] : values[i]) + other", "values[i] + other"),
    "sums over half of the lanes": (TILE, "sum_over_lanes<M / 2, 2 * MASK, END>(values, lane);", ""),
    "the rates of another lane": (TILE, "rates[v][j] = S(double(rates[v][j])", "rates[v][j] = S(double(rates[v][0])"),
    "what is never copied is not cleared": (TILE, "place.width < place.channels || place.args.N < kPadded", "false"),
    "stages that overlap": (TILE, "(reverse ? stages - 1 - i : i) * tokens", "(reverse ? stages - 1 - i : i)"),
    "a state that is not reset": (BACK, "if (flag & RESET) clear(states[k + 1]);", ""),
    "a gradient that passes a reset": (BACK, "later = flag & RESET ? S{} : decay", "later = decay"),
    "a gradient that passes a reset on padding": (BACK, "if (flag & RESET) {\n      clear(s);", "if (flag & RESET) {"),
    "a warp left out of the sums": (BACK, "for (int w = 0; w < warps; ++w)", "for (int w = 0; w < 1; ++w)"),
    "the saved states of the next group": (BACK, "take(SAVED + at - 1, h)", "take(SAVED + at, h)"),
    "the gradient of A of the first stage alone": (BACK, "put(GRAD_A, total);", ""),
    "a chunk that a reset does not cut off": (FORE, "cut ? kCut : power_of_two", "power_of_two"),
    "chunks that start from their own sums": (WHOLE, "at[k * step] = s;", ""),
}  # fmt: skip


def synchronisation() -> Iterator[tuple[str, str, str]]:
    """Name, file and text with one barrier, commit or wait less, or weaker."""
    for path in sorted(SOURCES.glob("selective*.cu*")):
        text = path.read_text()
        for pattern, replacement in SYNCHRONISATION:
            for number, match in enumerate(re.finditer(pattern, text), 1):
                new = text[: match.start()] + replacement(match) + text[match.end() :]
                yield f"{path.name} {match[0]} #{number} -> {replacement(match) or 'nothing'}", path.name, new


def survives(mode: str, folder, sources, cases: list[Case], launch) -> bool:
    """Whether all checks pass. A mutant must compile."""
    with HostCuda(mode, folder, sources).installed() as host:
        for case in cases:
            for seed in range(SEEDS if mode == "fibers" else 1):
                host.seed(100 * seed)
                try:
                    check(case, launch(case, make(case)))
                except CompileError:
                    raise
                except (AssertionError, RuntimeError):
                    return False
    return True


@pytest.fixture(autouse=True)
def compiler() -> None:
    skip_without_compiler()


def test_all_kinds_of_synchronisation_are_found():
    """The patterns are those of the sources: if the spelling changes, so must the patterns."""
    found = [name for name, *_ in synchronisation()]
    for spelling, count in (("__syncthreads", 4), ("async_commit", 1), ("async_wait", 2)):
        assert sum(spelling in name for name in found) == count, found


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ("races", "fibers"))
def test_the_sources_as_they_are_survive(mode, host_folder, tmp_path):
    sources = copy_with(tmp_path, TILE, (SOURCES / TILE).read_text())
    assert survives(mode, host_folder, sources, BACKWARD, run_backward)
    assert survives(mode, host_folder, sources, FORWARD, run)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ("races", "fibers"))
@pytest.mark.parametrize("mutant", list(synchronisation()), ids=lambda mutant: mutant[0])
def test_every_barrier_commit_and_wait_is_needed(mode, mutant, host_folder, tmp_path):
    _, name, text = mutant
    assert not survives(mode, host_folder, copy_with(tmp_path, name, text), BACKWARD, run_backward)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LOGIC)
def test_every_error_is_found(name, host_folder, tmp_path):
    file, old, new = LOGIC[name]
    text = (SOURCES / file).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}: adapt the mutation to the source"
    cases, launch = (FORWARD, run) if file == FORE else (BACKWARD, run_backward)
    assert not survives("fibers", host_folder, copy_with(tmp_path, file, text.replace(old, new)), cases, launch)
