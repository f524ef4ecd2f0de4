"""Compiles every CUDA program of the library into the cache, on all cores: seconds, registers, spills.

python benchmarks/compile_kernels.py                 # for the GPU that is here
python benchmarks/compile_kernels.py --arch sm_80 sm_90 sm_100 --only PART   # no GPU is needed for these
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

Row = tuple[float, float, int, int, str]  # seconds, KiB, registers, bytes of local memory, label


def compile_one(architecture: str, name: str, definitions: tuple[str, ...]) -> Row:
    """Compiles one program and leaves it in the cache."""
    from linrnn.kernels.cuda import cache, compiler

    start = time.perf_counter()
    source = compiler.read(name)
    image, log = compiler.compile_source(source, definitions, architecture)
    seconds = time.perf_counter() - start
    cache.store(cache.folder(), cache.entry(source, definitions, architecture, compiler.version()), image)
    found = compiler.resources(log).values()
    local = max((used.stack + used.spill_stores + used.spill_loads for used in found), default=0)
    registers = max((used.registers for used in found), default=0)
    return seconds, len(image) / 1024, registers, local, " ".join((architecture, name, *definitions))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", metavar="ARCH", help="such as sm_90 (default: that of the GPU)")
    parser.add_argument("--only", metavar="PART", default="", help="programs whose definitions contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")

    from linrnn.kernels import KernelUnavailable
    from linrnn.kernels.cuda import cache, compiler
    from linrnn.kernels.cuda.__main__ import programs

    if not args.arch:
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU: name architectures with --arch")
        args.arch = [compiler.target(torch.cuda.get_device_capability())]
    wanted = [
        (arch, name, definitions)
        for arch in args.arch
        for name, definitions in programs()
        if args.only in " ".join((name, *definitions))
    ]
    if not wanted:
        parser.error(f"--only {args.only}: no program has this in its definitions")
    start, rows = time.perf_counter(), []
    try:
        with ProcessPoolExecutor(min(args.jobs, len(wanted)), get_context("spawn")) as pool:
            for row in pool.map(compile_one, *zip(*wanted, strict=True)):
                rows.append(row)
                print("{:5.2f} s {:6.1f} KiB {:4} registers {:4} bytes of local memory  {}".format(*row), flush=True)
    except (KernelUnavailable, compiler.CompileError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    spilled = [label for *_, local, label in rows if local]
    print(
        f"{len(rows)} programs in {time.perf_counter() - start:.1f} s ({sum(r[0] for r in rows):.0f} s of work, the "
        f"longest {max(r[0] for r in rows):.1f} s), {sum(r[1] for r in rows) / 1024:.1f} MiB, at most "
        f"{max(r[2] for r in rows)} registers; {len(spilled)} with local memory{': ' * bool(spilled)}"
        f"{', '.join(spilled)}; cache {cache.folder()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
