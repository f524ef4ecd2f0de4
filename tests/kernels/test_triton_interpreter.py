"""The Triton kernels on the CPU: Triton's interpreter runs them, in float32, against the loops in float64.

The interpreter is chosen by the environment before the kernels are imported, so these tests run in a process of their
own; in the ordinary one this module holds a single test, which starts that.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = 3e-6  # relative, in the norm; float32 alone gives up to 4e-7 here
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
KINDS = ("none", "head", "channel")
DELTA = (False, True)


def make(T, K, V, kind, delta, strong=False, B=1, H=2) -> dict[str, Tensor]:
    """Inputs in float64, those that the op has."""
    inputs = {
        name: torch.randn(B, T, H, width, dtype=torch.float64) for name, width in zip("qkv", (K, K, V), strict=True)
    }
    if delta:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = 2 * torch.rand(B, T, H, dtype=torch.float64)
    if kind == "constant":
        inputs["log_decay"] = -torch.rand(H, dtype=torch.float64)
    elif kind != "none":
        inputs["log_decay"] = -torch.rand(B, T, H, *((K,) if kind == "channel" else ()), dtype=torch.float64)
        if strong:  # from nothing forgotten to all, side by side
            inputs["log_decay"] *= torch.tensor([1e-4, 1.0, 20.0, 500.0]).double()[torch.randint(4, (B, T, H))][
                (...,) + (None,) * (kind == "channel")
            ]
    inputs["initial_state"] = torch.randn(B, H, K, V, dtype=torch.float64)
    return inputs


def run(inputs: dict[str, Tensor], dtype: torch.dtype, backend: str, **options) -> dict[str, Tensor]:
    """o, the final state, and the gradients of all inputs, of fixed cotangents."""
    from linrnn.ops import delta_rule, linear_attention

    given = {name: v.to(dtype).requires_grad_() for name, v in inputs.items()}
    q, k, v, beta, log_decay, state = (given.get(name) for name in NAMES)
    options = {"log_decay": log_decay, "backend": backend, **options}
    if beta is None:
        o, last = linear_attention(q, k, v, state, **options)
    else:
        o, last = delta_rule(q, k, v, beta, state, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in (o, last)]
    grads = torch.autograd.grad((o, last), list(given.values()), cotangents)
    return {"o": o.detach(), "last": last.detach(), **dict(zip(given, grads, strict=True))}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        error = ((got[name].double() - want).norm() / want.norm().clamp_min(1e-30)).item()
        assert error < tolerance, f"{name}: relative error {error:.1e}"  # also NaN


def compare(inputs, options, **kernels) -> None:
    assert_close(
        run(inputs, torch.float32, "triton", **options, **kernels), run(inputs, torch.float64, "reference", **options)
    )


if not INTERPRETED:

    def test_in_the_interpreter():
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

else:

    @pytest.fixture(autouse=True)
    def triton_takes_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from linrnn.kernels import triton
        from linrnn.ops import _backend

        monkeypatch.setitem(_backend.DEVICES, "triton", "cpu")
        monkeypatch.setattr(triton, "unavailable", lambda device_index: None)
        yield

    @pytest.mark.parametrize("delta", DELTA)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("T", (5, 16, 35))
    def test_equals_the_loop(kind, delta, T):
        inputs = make(T, 16, 16, kind, delta)
        compare(inputs, {"scale": 0.3}, chunk_size=16)

    @pytest.mark.parametrize("delta", DELTA)
    @pytest.mark.parametrize("kind", KINDS)
    def test_odd_widths_take_several_blocks(kind, delta, monkeypatch):
        from linrnn.kernels.triton import plan

        def small(*args):
            return plan.Layout(4, 16, 16, 4, 1)

        monkeypatch.setattr(plan, "layout", small)
        compare(make(19, 24, 20, kind, delta, H=1), {})

    @pytest.mark.parametrize("delta", DELTA)
    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_chunks_of_64_with_decays_of_all_sizes(kind, delta, monkeypatch):
        from linrnn.kernels.triton import plan

        monkeypatch.setattr(plan, "layout", lambda *args: plan.Layout(6, 16, 16, 4, 1))
        compare(make(70, 16, 16, kind, delta, strong=True, H=1), {})

    @pytest.mark.parametrize("delta", DELTA)
    def test_one_decay_per_head(delta):
        compare(make(20, 16, 16, "constant", delta), {})

    @pytest.mark.parametrize("delta", DELTA)
    @pytest.mark.parametrize("kind", KINDS)
    def test_reset_and_mask(kind, delta):
        inputs = make(20, 16, 16, kind, delta, B=2, H=1)
        flags = {"reset": torch.rand(2, 20) < 0.2, "mask": torch.rand(2, 20) < 0.8}
        compare(inputs, flags, chunk_size=16)

    @pytest.mark.parametrize("delta", DELTA)
    def test_a_log_decay_of_minus_infinity_forgets_all(delta):
        inputs = make(20, 16, 16, "head", delta, H=1)
        inputs["log_decay"][:, 7] = -torch.inf
        inputs["log_decay"][:, 18] = -1e30
        compare(inputs, {})

    def test_without_an_initial_state():
        inputs = make(20, 16, 16, "head", True)
        del inputs["initial_state"]
        compare(inputs, {})

    def test_normalized():
        from linrnn.ops import linear_attention

        inputs = make(20, 16, 16, "head", False)
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        for features in (True, False):
            q, k = (q, k) if features else (q.exp(), k.exp())
            outs = []
            for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
                given = [x.to(dtype).requires_grad_() for x in (q, k, v, log_decay)]
                o, (S, z, _) = linear_attention(
                    *given[:3], log_decay=given[3], normalize=True, log_features=features, backend=backend
                )
                grads = torch.autograd.grad((o.sin().sum(), S.sin().sum(), z.sin().sum()), given)
                outs.append({"o": o, "S": S, "z": z, **dict(zip("qkvg", grads, strict=True))})
            assert_close(*outs)

    @pytest.mark.parametrize("delta", DELTA)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("T", (1, 3))
    def test_token_by_token(kind, delta, T):
        inputs = make(T, 20, 17, kind, delta, B=2)
        results = []
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
            results.append(outputs(inputs, dtype, backend))
        assert_close(*results)

    def outputs(inputs, dtype, backend) -> dict[str, Tensor]:
        from linrnn.ops import delta_rule, linear_attention

        q, k, v, beta, g, state = (inputs[x].to(dtype) if x in inputs else None for x in NAMES)
        options = {"log_decay": g, "mode": "recurrent" if backend == "triton" else "reference", "backend": backend}
        with torch.no_grad():
            if beta is None:
                o, last = linear_attention(q, k, v, state, **options)
            else:
                o, last = delta_rule(q, k, v, beta, state, **options)
        return {"o": o, "last": last}

    def test_a_step_may_overwrite_its_state():
        from linrnn.kernels.triton.linear_attention import step

        inputs = make(1, 16, 16, "channel", True)
        q, k, v, beta, g, state = (inputs[name].float() for name in NAMES)
        o, last = step(q, k, v, beta, g, state, 1.0, torch.float32)
        o_in_place, out = step(q, k, v, beta, g, state, 1.0, torch.float32, out=state)
        assert out is state
        assert torch.equal(out, last) and torch.equal(o_in_place, o)

    @pytest.mark.parametrize("delta", DELTA)
    def test_second_derivatives(delta):
        from linrnn.ops import delta_rule, linear_attention

        inputs = make(6, 16, 16, "head", delta, H=1)

        def second(dtype, backend):
            given = [v.to(dtype).requires_grad_() for v in inputs.values()]
            named = dict(zip(inputs, given, strict=True))
            q, k, v, beta, g, state = (named.get(name) for name in NAMES)
            if delta:
                o, last = delta_rule(q, k, v, beta, state, log_decay=g, backend=backend)
            else:
                o, last = linear_attention(q, k, v, state, log_decay=g, backend=backend)
            first = torch.autograd.grad(o.sin().sum() + last.sin().sum(), given, create_graph=True)
            grads = torch.autograd.grad(sum(x.sin().sum() for x in first), given)
            return dict(zip(inputs, grads, strict=True))

        assert_close(second(torch.float32, "triton"), second(torch.float64, "reference"), 3e-5)

    def test_only_one_output_is_used():
        inputs = make(20, 16, 16, "head", False)

        def grads(dtype, backend, which):
            from linrnn.ops import linear_attention

            given = {name: v.to(dtype).requires_grad_() for name, v in inputs.items()}
            q, k, v, g, state = given.values()
            out = linear_attention(q, k, v, state, log_decay=g, backend=backend)[which]
            found = torch.autograd.grad(out.sin().sum(), list(given.values()), materialize_grads=True)
            return dict(zip(given, found, strict=True))

        for which in (0, 1):
            assert_close(grads(torch.float32, "triton", which), grads(torch.float64, "reference", which))

    def test_the_operator_is_right_for_the_compiler():
        from linrnn.ops._triton import attention_op

        for kind, delta in (("channel", False), ("head", True)):
            inputs = make(5, 16, 16, kind, delta, H=1)
            tensors = [inputs[x].float().requires_grad_() if x in inputs else None for x in NAMES]
            torch.library.opcheck(attention_op, (*tensors, 0.5, 16, torch.float32, False))

    def test_what_the_kernels_cannot_run():
        from linrnn.ops import linear_attention

        q = torch.randn(1, 4, 1, 16)
        for inputs, options, reason in (
            (q.double(), {}, "float64"),
            (q, {"mode": "parallel"}, "mode='parallel'"),
        ):
            with pytest.raises(ValueError, match=f"backend='triton' cannot run this call: .*{reason}"):
                linear_attention(inputs, inputs, inputs, backend="triton", **options)
            o, _ = linear_attention(inputs, inputs, inputs, **options)
            wanted, _ = linear_attention(inputs, inputs, inputs, backend="torch", **options)
            assert torch.equal(o, wanted)

    def test_transforms_take_the_torch_form():
        from linrnn.ops import linear_attention

        q = torch.randn(3, 1, 4, 1, 16)

        def run(x, backend):
            return linear_attention(x, x, x, backend=backend)[0]

        torch.testing.assert_close(
            torch.func.vmap(lambda x: run(x, "auto"))(q), torch.stack([run(x, "torch") for x in q])
        )
        with pytest.raises(ValueError, match=r"torch\.func"):
            torch.func.vmap(lambda x: run(x, "triton"))(q)
