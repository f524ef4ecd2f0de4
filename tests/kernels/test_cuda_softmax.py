"""The CUDA kernels of the running softmax, on the CPU through the same launcher, against autograd of the reference."""

import itertools
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from linrnn.kernels import cuda, state_dtype
from linrnn.kernels.cuda import softmax_scan as launcher
from linrnn.kernels.cuda.plan import Plan
from linrnn.ops import SoftmaxState, _softmax_torch, softmax_scan

from .host import SOURCES, HostCuda, skip_without_compiler
from .host_scans import LAYOUTS, OPTIONS, PLANS, lay_out

NAMES = ("o", "m", "z", "y", "grad logits", "grad v", "grad m", "grad z", "grad y")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One forward and one backward call."""

    shape: tuple[int, int, int, int] = (2, 17, 3, 5)
    v: torch.dtype = F64
    plan: str = "columns"
    options: str = "plain"
    with_state: bool = True
    reverse: bool = False
    layout: str = "dense"
    size: float = 5.0


def make(case: Case) -> tuple[list[Tensor], dict[str, Tensor | bool], list[Tensor]]:
    """Logits, v and the fields of a state; the options; cotangents of all outputs."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, V = case.shape
    wide = state_dtype(case.v)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=generator)

    logits = case.size * normal(B, T, H)
    logits[torch.rand(B, T, H, generator=generator) < 0.1] = -torch.inf
    v = lay_out(normal(B, T, H * V).to(case.v), case.layout).unflatten(2, (H, V))
    inputs = [lay_out(logits.to(wide), case.layout), v]
    if case.with_state:
        inputs += [normal(B, H).to(wide), normal(B, H).abs().to(wide), normal(B, H, V).to(wide)]
    options: dict[str, Tensor | bool] = {"reverse": case.reverse}
    if "reset" in case.options:
        options["reset"] = torch.rand(B, T, generator=generator) < 0.15
    if "mask" in case.options:
        options["mask"] = torch.rand(B, T, generator=generator) < 0.8
    grads = [normal(B, T, H, V).to(case.v), normal(B, H).to(wide), normal(B, H).to(wide), normal(B, H, V).to(wide)]
    return inputs, options, grads


def run(case: Case) -> list[Tensor]:
    """Outputs and gradients, by the kernels."""
    (logits, v, *state), options, grads = make(case)
    past, plan = tuple(state) if state else None, PLANS[case.plan]
    zeros = torch.zeros(v.shape[:2], dtype=torch.uint8)
    flags = None
    if "reset" in options or "mask" in options:
        flags = options.get("reset", zeros) | (2 * (1 - options.get("mask", zeros + 1).to(torch.uint8)))
        flags = flags.to(torch.uint8)
    o, *final, m, z = launcher.forward(logits, v, past, flags, case.reverse, True, plan=plan)

    def head_scan(*args):
        return launcher.head_scan(*args, plan=plan)

    kernels = SimpleNamespace(head_scan=head_scan, row_dots=launcher.row_dots)
    sequences = (logits, v, past, flags, o, *final[1:], m, z, grads[0])
    found = _softmax_torch.gradients(*sequences, tuple(grads[1:]), case.reverse, kernels)
    return [o, *final, *found[: len(state) + 2]]


def reference(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The same by autograd of the reference, in `dtype`."""
    inputs, options, grads = make(case)
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    state = SoftmaxState(*leaves[2:]) if case.with_state else None
    o, final = softmax_scan(leaves[0], leaves[1], state, **options, backend="reference")
    pairs = [(x, g.to(dtype)) for x, g in zip((o, *final), grads, strict=True) if x.requires_grad]
    found = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True)
    return [x.detach() for x in (o, *final, *found)]


def check(case: Case) -> None:
    """Raises AssertionError where a result is further from float64 than twice the loop in the kernel's precision.

    Half precision adds the roundings of what it stores: the backward reads a rounded o and a rounded gradient of v.
    """
    wide = state_dtype(case.v)
    exacts, roughs = reference(case, F64), reference(case, wide)
    of_gradients = max([1.0, *(float(x.abs().amax()) for x in exacts[4:])])  # that of m is a difference of others
    for name, got, exact, rough in zip(NAMES, run(case), exacts, roughs, strict=False):
        assert got.shape == exact.shape and got.isfinite().all(), (case, name)
        scale = of_gradients if name.startswith("grad") else float(exact.abs().amax())
        stored = torch.finfo(case.v).eps if case.v.itemsize == 2 else 0.0
        bound = 2 * (rough.double() - exact).abs().max() + (32 * torch.finfo(wide).eps + 4 * stored) * scale
        if name == "m" and scale > 1e30:  # where a reset has left nothing
            bound = bound + 1e-6 * scale
        error = (got.double() - exact).abs().max()
        assert error <= bound, f"{name} is off by {error:.3g} (allowed {bound:.3g}) in {case}"


def kinds(**fixed):
    """Options, plans and layouts taking turns."""
    for n, (plan, options) in enumerate(itertools.product(PLANS, OPTIONS)):
        yield Case(
            **fixed,
            plan=plan,
            options=options,
            with_state=n % 3 > 0,
            reverse=n % 2 == 1,
            layout=LAYOUTS[n % len(LAYOUTS)],
            size=(5.0, 1e3)[n % 2],
        )


@pytest.mark.parametrize(
    "dtype", (F32, BF16, pytest.param(F64, marks=pytest.mark.slow), pytest.param(F16, marks=pytest.mark.slow)), ids=str
)
def test_every_dtype(host_cuda, dtype):
    for V in (5, 8) if dtype.itemsize == 2 else (5,):
        for case in kinds(v=dtype, shape=(2, 37, 3, V)):
            check(case)


def test_every_shape(host_cuda):
    for n, ((B, T), (H, V)) in enumerate(
        itertools.product(((1, 1), (3, 2), (1, 65), (2, 130)), ((1, 1), (1, 40), (7, 3), (2, 16)))
    ):
        plan = list(PLANS)[n % len(PLANS)]
        check(Case((B, T, H, V), v=F32, plan=plan, options=OPTIONS[n % 4]))


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_reaches_over_a_reset_or_out_of_padding(host_cuda, plan):
    """NaN in a document before, or at a padded token."""
    (logits, v), _, _ = make(Case((1, 40, 2, 3), with_state=False, plan=plan))
    flags = torch.zeros(1, 40, dtype=torch.uint8)
    flags[0, 21], flags[0, 5:9] = 1, 2
    clean = launcher.forward(logits, v, None, flags, False, True, plan=PLANS[plan])
    v[0, 5:9], logits[0, 6] = torch.nan, torch.nan
    padded = launcher.forward(logits, v, None, flags, False, True, plan=PLANS[plan])
    assert all(map(torch.equal, padded, clean))
    v[0, 12], logits[0, 15] = torch.nan, torch.nan
    broken = launcher.forward(logits, v, None, flags, False, True, plan=PLANS[plan])
    assert torch.equal(broken[0][:, 21:], clean[0][:, 21:]) and all(map(torch.equal, broken[1:4], clean[1:4]))
    assert broken[0][:, 15:21].isnan().all()


def test_only_listed_programs_are_asked_for(host_cuda):
    for dtype, options in itertools.product((F32, BF16), ("plain", "mask")):
        check(Case(v=dtype, options=options, plan="rule"))
    assert set(host_cuda.programs) <= set(launcher.PROGRAMS)


def test_the_op_takes_them(host_cuda, monkeypatch):
    """A whole call through linrnn.ops, its backward included, as it is made on a GPU."""
    from linrnn.ops import _softmax_scan

    monkeypatch.setattr(_softmax_scan, "choose", lambda *_: "cuda")
    (logits, v, *state), _, _ = make(Case(v=F32))
    grads = []
    for backend in ("cuda", "reference"):
        leaves = [x.clone().requires_grad_() for x in (logits, v, *state)]
        o, final = softmax_scan(leaves[0], leaves[1], SoftmaxState(*leaves[2:]), backend=backend)
        grads.append(torch.autograd.grad(o.sin().sum() + final.y.sum(), leaves))
    assert {name for name, *_ in host_cuda.launches} == {"softmax_sequential", "row_dots"}
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_no_races(host_folder):
    """By CUDA's rules, in shared and in global memory, within blocks and between them."""
    skip_without_compiler()
    with HostCuda("races", host_folder).installed():
        for plan in PLANS:
            check(Case((2, 37, 2, 8), v=F32, plan=plan, options="reset+mask", reverse=plan == "chunks"))


# what stands in softmax_scan.cu, what is put there
MUTATIONS = {
    "a larger logit that rescales nothing": ("past = larger ? power : R(1)", "past = R(1)"),
    "the larger of two pieces alone": ("merged.z = s.z * by.past + q.z * by.now", "merged.z = q.z * by.now"),
    "a reset that keeps the state before it": ("s[i] = Sum{};", ";"),
    "a piece with a reset that lets the past through": ("RESET) p[i] = 0;\n  }", "RESET) p[i] = 1;\n  }"),
    "padding that brings its token": ("if (row.flag & HOLD) return;", ""),
    "another head's logit": ("logits(args.logits, b, d / args.head)", "logits(args.logits, b, 0)"),
    "a dot product without its last lanes": ("lane = kLanes / 2", "lane = kLanes / 4"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_fails(name, tmp_path):
    skip_without_compiler()
    folder = tmp_path / "kernels" / "cuda"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "prebuilt"))
    shutil.copy(SOURCES.parent / "numbers.h", folder.parent)
    before, after = MUTATIONS[name]
    text = (folder / "softmax_scan.cu").read_text()
    assert text.count(before) == 1
    (folder / "softmax_scan.cu").write_text(text.replace(before, after))
    with HostCuda("fibers", tmp_path, folder).installed(), pytest.raises(AssertionError):
        for plan in ("columns", "segments", "chunks"):
            check(Case((1, 37, 2, 5), v=F32, plan=plan, options="reset+mask"))


def test_a_plan_of_another_shape_fits_shared_memory(host_cuda):
    """Stages shrink until a block has room."""
    check_plan = Plan(width=64, segments=4, rows=64)
    (logits, v, *state), _, _ = make(Case(v=F64))
    wanted = launcher.forward(logits, v, tuple(state), None, False, True)
    got = launcher.forward(logits, v, tuple(state), None, False, True, plan=check_plan)
    torch.testing.assert_close(got, wanted)
    assert cuda.properties(0) is host_cuda.device
