"""selective_scan with backend="cuda": the contract of the op, against the loop on the CPU in double precision."""

import contextlib
import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from linrnn.ops import BackendUnavailable, _selective_scan, selective_scan

from .test_selective_scan import make, run

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = "cuda", "cuda"
# B, T, D, N, G: every tile, odd sizes, many channels, and few beside a long T
SHAPES = (
    (2, 1, 3, 1, 1),
    (3, 63, 4, 16, 2),
    (2, 200, 70, 3, 1),
    (1, 130, 64, 8, 1),
    (2, 65, 40, 32, 4),
    (2, 65, 33, 40, 1),
    (1, 70, 20, 128, 1),
    (1, 50, 12, 200, 1),
    (4, 64, 1024, 16, 1),
    (1, 2000, 6, 16, 1),
)


def moved(values: dict) -> dict:
    return {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in values.items()}


@contextlib.contextmanager
def poisoned():
    """Fills torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_device(inputs: dict, options: dict) -> list[Tensor]:
    with poisoned():
        return [v.cpu() for v in run(BACKEND, moved(inputs), moved(options))]


def distance(got: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the largest element."""
    if not wanted.numel():
        return 0.0
    return ((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("flags", (0, 1, 2, 3), ids=("plain", "reset", "mask", "reset+mask"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_equals_the_loop(shape, flags):
    inputs, options = make(*shape, flags=flags)
    for got, wanted in zip(on_device(inputs, options), run("reference", inputs, options), strict=True):
        assert distance(got, wanted) < 1e-11


@pytest.mark.parametrize("flags", (0, 3), ids=("plain", "reset+mask"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_about_as_exact_as_the_plain_loop(shape, flags):
    """The exponential is right to two units in the last place, so a few times the loop's error is allowed."""
    inputs, options = make(*shape, flags=flags)
    narrow = {name: v.float() for name, v in inputs.items()}
    exact, rough = run("reference", inputs, options), run("reference", narrow, options)
    for got, loop, wanted in zip(on_device(narrow, options), rough, exact, strict=True):
        assert distance(got, wanted) <= 6 * distance(loop, wanted) + 2e-6


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("D", (64, 33))
def test_half_precision_is_storage(dtype, D):
    """States and sums are float32: what comes out is the float32 result, rounded once."""
    inputs, options = make(2, 300, D, 16, dtype=torch.float32)
    sequences = {name: inputs[name].to(dtype) for name in ("x", "dt", "B", "C", "z")}
    given = moved(inputs | sequences)
    y, state = selective_scan(**given, **options, backend=BACKEND)
    widened = {k: v.float() if k in sequences else v for k, v in given.items()}
    wide, wide_state = selective_scan(**widened, **options, backend=BACKEND)
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype)) and torch.equal(state, wide_state)
    exact = run("reference", {k: v.double() for k, v in (inputs | sequences).items()}, options)
    for got, wanted in zip(on_device(inputs | sequences, options), exact, strict=True):
        assert distance(got, wanted) < (2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("shape", ((3, 90, 70, 16, 1), (1, 2000, 6, 16, 1)), ids=str)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_nothing_reaches_over_a_reset_or_out_of_padding(shape, bad):
    inputs, options = make(*shape, dtype=torch.float32)
    B, T = shape[:2]
    at = T // 2
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, at] = True
    clean = on_device(inputs, options | {"reset": reset})
    broken = {name: v.clone() for name, v in inputs.items()}
    broken["x"][:, 7], broken["initial_state"][:] = bad, bad
    got = on_device(broken, options | {"reset": reset})
    assert torch.equal(got[0][:, at:], clean[0][:, at:]) and torch.equal(got[1], clean[1])
    assert torch.equal(got[2][:, at:], clean[2][:, at:])

    mask = torch.rand(B, T) < 0.6
    clean = on_device(inputs, options | {"mask": mask})
    broken = dict(inputs)
    for name in ("x", "dt", "B", "C", "z"):
        broken[name] = torch.where(mask.view(B, T, *(1,) * (inputs[name].ndim - 2)), inputs[name], bad)
    for got, wanted in zip(on_device(broken, options | {"mask": mask}), clean, strict=True):
        assert torch.equal(got, wanted)


def test_strided_inputs_and_the_same_bits_every_time():
    inputs, options = make(2, 150, 33, 16, dtype=torch.float32)
    wanted = on_device(inputs, options)
    apart = {name: torch.stack((v, v), -1)[..., 0] for name, v in inputs.items()}
    narrow = {
        name: torch.cat((v, v), -1)[..., : v.shape[-1]] if name in ("x", "dt", "z") else v for name, v in inputs.items()
    }
    for given, tolerance in ((inputs, 0.0), (apart, 1e-5), (narrow, 1e-5), (inputs, 0.0)):
        for got, first in zip(on_device(given, options), wanted, strict=True):
            assert distance(got, first.double()) <= tolerance


@pytest.mark.parametrize("flags", (0, 3))
def test_gradcheck_and_gradgradcheck(flags):
    inputs, options = make(1, 4, 2, 2, flags=flags)
    inputs, options = moved(inputs), moved(options)
    tensors = [v.requires_grad_() for v in inputs.values()]

    def scan(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), **options, backend=BACKEND)

    assert gradcheck(scan, tensors, nondet_tol=0.0)
    assert gradgradcheck(scan, tensors)


@pytest.mark.parametrize("flags", (0, 3))
def test_compiles(flags):
    inputs, options = make(T=70, flags=flags)
    inputs, options = moved(inputs), moved(options)

    def outputs(function):
        tensors = {name: v.clone().requires_grad_() for name, v in inputs.items()}
        y, state = function(**tensors, **options)
        return y, state, *torch.autograd.grad(y.sin().sum() + state.sum(), list(tensors.values()))

    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled), outputs(selective_scan))
    tensors = [inputs[name].detach().requires_grad_() for name in ("x", "dt", "A", "B", "C", "initial_state")]
    torch.library.opcheck(_selective_scan.scan_op, (*tensors, None, 16, True, "auto"))


def test_a_captured_graph_is_replayed_on_other_numbers():
    inputs = moved(make(2, 100, 64, 16, dtype=torch.float32)[0])
    selective_scan(**inputs, backend=BACKEND)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, state = selective_scan(**inputs, backend=BACKEND)
    inputs["x"].normal_()
    graph.replay()
    torch.testing.assert_close((y, state), selective_scan(**inputs, backend=BACKEND), rtol=0, atol=0)


def test_what_has_no_kernel_runs_in_torch_or_says_why():
    for shape, of_A, reason in (((1, 9, 2, 3), "complex", "take a real A"), ((1, 9, 2, 257), "real", "at most 256")):
        inputs, options = make(*shape, of_A=of_A)
        wanted = run("reference", inputs, options)
        for got, expected in zip(run("auto", moved(inputs), options), wanted, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-9)
        with pytest.raises(BackendUnavailable, match=f"backend='cuda' cannot run here: .*{reason}"):
            selective_scan(**moved(inputs), **options, backend=BACKEND)


@pytest.mark.slow
def test_sizes_beyond_32_bits():
    """More than 2^31 numbers in x, whose last rows are those of a small scan."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    B, T, D = 1, 2**20 + 64, 2048
    x, dt = torch.zeros(B, T, D, dtype=torch.bfloat16, device=DEVICE), torch.full((), 0.1, device=DEVICE)
    inputs = moved(make(1, 64, D, 4, dtype=torch.float32)[0])
    x[:, -64:] = inputs["x"]
    Bs, Cs = (torch.zeros(B, T, 1, 4, device=DEVICE) for _ in range(2))
    Bs[:, -64:], Cs[:, -64:] = inputs["B"], inputs["C"]
    y, state = selective_scan(x, dt.expand(B, T, D), inputs["A"], Bs, Cs, backend=BACKEND)
    small, small_state = selective_scan(
        x[:, -64:], dt.expand(B, 64, D), inputs["A"], Bs[:, -64:], Cs[:, -64:], backend=BACKEND
    )
    torch.testing.assert_close(y[:, -64:], small)
    torch.testing.assert_close(state, small_state)
    assert (y[:, :-64] == 0).all()


def test_many_sizes_agree_with_torch():
    """The rule's plans, around its borders."""
    for B, T, D in itertools.product((1, 9), (127, 128, 1000), (1, 64, 300)):
        inputs, options = make(B, T, D, 16, dtype=torch.float64, flags=1)
        wanted = run("torch", moved(inputs), moved(options))
        for got, expected in zip(run(BACKEND, moved(inputs), moved(options)), wanted, strict=True):
            assert distance(got.cpu(), expected.cpu()) < 1e-11
