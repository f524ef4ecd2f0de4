"""diagonal_scan on the CPU beside torch.add on the same bytes, a loop, and the scans of the peers.

    pip install -e '.[bench]' && python benchmarks/scan.py            # about ten minutes; writes benchmarks/results/
    python benchmarks/scan.py --shapes 4,1024,256 --no-write         # one shape

All run in one process, interleaved, and the fastest run counts. torch.add(a, x) reads two tensors and writes one, as a
scan with a varying gate must: its time is the floor, and the table prints ratios to it. Memory is warm (glibc keeps
what is freed). Forward+backward takes the gradient of a and of x.
"""

import argparse

import common
import torch

from linrnn.ops import diagonal_scan

SHAPES = ((8, 4096, 256), (1, 65536, 64), (32, 1024, 512), (4, 1024, 256))


def loop(a, x):
    h, hs = torch.zeros_like(x[:, 0]), []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
        h = torch.addcmul(x_t, a_t, h)
        hs.append(h)
    return torch.stack(hs, 1)


def torch_associative_scan(a, x):
    from torch._higher_order_ops.associative_scan import associative_scan

    return associative_scan(lambda u, v: (v[0] * u[0], v[0] * u[1] + v[1]), (a, x), dim=1, combine_mode="generic")[1]


def peers() -> dict:
    """Name -> scan(a, x) of every peer that is installed; JAX apart, since it takes its own arrays."""
    found = {"Python loop": loop, "torch associative_scan": torch_associative_scan}
    try:
        from accelerated_scan.ref import scan

        # time last, and a power of two long: both are its rules
        found["accelerated_scan.ref"] = lambda a, x: scan(a.mT.contiguous(), x.mT.contiguous()).mT
    except ImportError as error:
        print(f"accelerated_scan left out: {error}")
    try:
        from mambapy.pscan import pscan

        found["mambapy pscan"] = lambda a, x: pscan(a[..., None], x[..., None])[..., 0]
    except ImportError as error:
        print(f"mambapy left out: {error}")
    return found


def jax_functions(a, x, g) -> dict:
    try:
        import jax
    except ImportError as error:
        print(f"JAX left out: {error}")
        return {}
    ja, jx, jg = (jax.numpy.asarray(v.numpy()) for v in (a, x, g))
    scan = jax.jit(
        lambda a, x: jax.lax.associative_scan(lambda u, v: (v[0] * u[0], v[0] * u[1] + v[1]), (a, x), axis=1)[1]
    )
    both = jax.jit(lambda a, x, g: jax.vjp(scan, a, x)[1](g))
    return {
        "forward": lambda: scan(ja, jx).block_until_ready(),
        "both": lambda: jax.block_until_ready(both(ja, jx, jg)),
    }


def measure(shape, dtype) -> list[tuple[str, float, float]]:
    """Rows (name, forward ms, forward+backward ms) at one shape; the first is torch.add, the same in both columns.

    Where tensors lie in memory changes times by tens of percent, so there are three rounds with new tensors, and the
    fastest counts, for torch.add as for the scans. The peers, which are far slower, run in the first round only.
    """
    ours = {
        "linrnn": lambda a, x: diagonal_scan(a, x)[0],
        "linrnn torch": lambda a, x: diagonal_scan(a, x, backend="torch")[0],
    }
    forward_ms: dict[str, float] = {}
    both_ms: dict[str, float] = {}
    for turn in range(3):
        displaced = torch.empty(torch.randint(1, 1 << 20, ()))  # noqa: F841 - moves what is allocated after it
        a = (0.9 + 0.1 * torch.rand(shape)).to(dtype)
        if dtype.is_complex:
            a = a * torch.exp(1j * torch.rand(shape))
        x, g, constant = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), a[0, 0].clone()
        scans = ours | peers() if turn == 0 else {"linrnn": ours["linrnn"]}
        if turn == 0:
            check(scans, a, x)
        inputs = [v.clone().requires_grad_() for v in (a, x, constant)]

        def both(scan, gate, inputs=inputs, g=g):
            return torch.autograd.grad(scan(inputs[gate], inputs[1]), (inputs[gate], inputs[1]), g)

        add = {"torch.add": lambda a=a, x=x: torch.add(a, x)}
        forward = add | {"linrnn, constant a": lambda c=constant, x=x: diagonal_scan(c, x)}
        forward |= {name: lambda scan=scan, a=a, x=x: scan(a, x) for name, scan in scans.items()}
        backward = add | {"linrnn, constant a": lambda both=both: both(ours["linrnn"], 2)}
        backward |= {name: lambda scan=scan, both=both: both(scan, 0) for name, scan in scans.items()}
        if turn == 0:
            jax = jax_functions(a, x, g)
            forward |= {"JAX associative_scan": jax["forward"]} if jax else {}
            backward |= {"JAX associative_scan": jax["both"]} if jax else {}
        with torch.no_grad():
            merge(forward_ms, common.best_times(forward))
        merge(both_ms, common.best_times(backward))
    floor = min(forward_ms["torch.add"], both_ms["torch.add"])
    forward_ms["torch.add"] = both_ms["torch.add"] = floor
    return [(name, forward_ms[name], both_ms[name]) for name in forward_ms]


def check(scans: dict, a, x) -> None:
    """No speed beside a wrong answer."""
    wanted = diagonal_scan(a.to(torch.promote_types(a.dtype, torch.float64)), x)[0]
    for name, scan in scans.items():
        error = (scan(a, x) - wanted).abs().max() / wanted.abs().max()
        if not error < 1e-4:
            raise SystemExit(f"{name} is wrong at {tuple(x.shape)} {x.dtype}: relative error {error:.1e}")


def merge(best: dict[str, float], times: dict[str, float]) -> None:
    best.update({name: min(ms, best.get(name, ms)) for name, ms in times.items()})


def step_overhead() -> str:
    """Microseconds of one decoding step at B = 1, D = 256, on one thread."""
    a, varying, x, state = torch.rand(256), torch.rand(1, 1, 256), torch.randn(1, 1, 256), torch.randn(1, 256)
    calls = 500
    with torch.inference_mode():
        functions = {
            "torch.addcmul": lambda: [torch.addcmul(x, a, state[:, None]) for _ in range(calls)],
            "diagonal_scan, constant a": lambda: [diagonal_scan(a, x, state) for _ in range(calls)],
            "varying a": lambda: [diagonal_scan(varying, x, state) for _ in range(calls)],
            "no state": lambda: [diagonal_scan(a, x) for _ in range(calls)],
        }
        times = common.best_times(functions)
    return "; ".join(f"{name} {1e3 * ms / calls:.1f} us" for name, ms in times.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=[",".join(map(str, s)) for s in SHAPES], help="B,T,D ...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common.keep_memory_warm()
    torch.manual_seed(0)

    lines = [common.head("Diagonal scan on the CPU", "linrnn", "accelerated-scan", "mambapy", "jax")]
    lines += ["Milliseconds, and in brackets the ratio to torch.add of two tensors of x's size.", ""]
    for shape in (tuple(map(int, s.split(","))) for s in args.shapes):
        for dtype in (torch.float32, torch.complex64):
            rows = measure(shape, dtype)
            add = rows[0][1]
            best_peer = [min(r[i] for r in rows if not r[0].startswith(("linrnn", "torch.add"))) for i in (1, 2)]
            lines += [
                f"## {shape} {str(dtype).removeprefix('torch.')}",
                "",
                "| | forward | forward + backward |",
                "| --- | ---: | ---: |",
            ]
            for name, forward, both in rows:
                cells = [
                    f"{ms:.2f} ({ms / add:.2f})" for ms in ((forward,) if name == "torch.add" else (forward, both))
                ]
                lines.append(f"| {name} | " + " | ".join(cells + ["-"] * (2 - len(cells))) + " |")
            ours = next(r for r in rows if r[0] == "linrnn")
            lines += [
                "",
                f"Best peer / linrnn: forward {best_peer[0] / ours[1]:.1f}, both {best_peer[1] / ours[2]:.1f}.",
                "",
            ]
            print("\n".join(lines[-len(rows) - 7 :]), flush=True)
    torch.set_num_threads(1)
    lines += [f"One decoding step, B = 1, D = 256, float32, one thread: {step_overhead()}.", ""]
    print(lines[-2])
    if not args.no_write:
        path = common.RESULTS / f"scan_cpu_{args.threads}threads.md"
        path.write_text("\n".join(lines))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
