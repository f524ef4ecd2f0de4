"""Says whether the CUDA kernels can run here and why not, or compiles them ahead of time."""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from linrnn.kernels import KernelUnavailable
from linrnn.kernels.cuda import PROBE, cache, compiler, properties, unavailable


def programs() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Every program that the library uses: source and definitions.

    Beside each source is the launcher of the same name, whose PROGRAMS lists them.
    """
    launchers = sorted(path.stem for path in compiler.FOLDER.glob("*.cu") if path.name != PROBE[0])
    modules = (importlib.import_module(f"linrnn.kernels.cuda.{name}") for name in launchers)
    return (PROBE, *(program for module in modules for program in module.PROGRAMS))


def diagnose(device_index: int) -> int:
    """Prints what the kernels find here; 0 if they can run, else 1."""
    rows = [("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}")]
    try:
        found = properties(device_index)
        major, minor = found.capability
        rows += [
            ("device", f"cuda:{device_index}, {found.name}, compute capability {major}.{minor}"),
            ("", f"{found.multiprocessors} multiprocessors, {found.l2_bytes / 2**20:.0f} MiB of L2"),
            ("driver", "CUDA {}.{}".format(*found.driver_version)),
        ]
    except RuntimeError as error:
        rows.append(("device", f"none: {error}"))
    try:
        rows += [("NVRTC", "{}.{}".format(*compiler.version())), ("", _location())]
    except KernelUnavailable as error:
        rows.append(("NVRTC", f"none: {error}"))
    kept = cache.entries(cache.folder())
    size = sum(size for (_, size), _ in kept) / 2**20
    rows.append(("cache", f"{cache.folder() or 'none: there is no home folder'}, {len(kept)} entries, {size:.1f} MiB"))
    rows.append(("prebuilt", f"{len(cache.entries(cache.PREBUILT))} programs came with the package"))
    reason = unavailable(device_index)
    rows.append(("kernels run", "yes" if reason is None else f"no: {reason}"))
    for label, text in rows:
        print(f"{label:<12} {text}")
    return 0 if reason is None else 1


def build(architectures: list[str], out: Path | None) -> int:
    """Compiles every program for every architecture into `out` (the cache); 0 if all were written and fit."""
    spilled = 0
    where = out or cache.folder()
    everything = [(arch, *program) for arch in architectures for program in programs()]
    for number, (architecture, name, definitions) in enumerate(everything, 1):
        began = time.perf_counter()
        source = compiler.read(name)
        try:
            image, log = compiler.compile_source(source, definitions, architecture)
        except (KernelUnavailable, compiler.CompileError) as error:
            print(error, file=sys.stderr)
            return 1
        written = cache.store(where, cache.entry(source, definitions, architecture, compiler.version()), image)
        if written is None:
            print(f"{where} cannot be written; choose another folder with --out", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - began
        label = " ".join((architecture, name, *definitions))
        size = f"{len(image) / 1024:6.1f} KiB {_registers(log)}"
        spilled += "spills" in size
        print(f"[{number}/{len(everything)}] {seconds:5.2f} s {size}  {label}", flush=True)
    print(f"written to {where}")
    if spilled:
        print(f"{spilled} programs do not fit the registers: they run, but slower", file=sys.stderr)
    return 1 if spilled else 0


def _registers(log: str) -> str:
    """The largest number of registers a kernel takes, and what did not fit; nothing for PTX, which has none yet."""
    found = compiler.resources(log).values()
    if not found:
        return ""
    local = max(used.stack + used.spill_stores + used.spill_loads for used in found)
    return f"{max(used.registers for used in found):4} registers" + (
        f", {local} bytes of spills and stack" * (local > 0)
    )


def _architecture(text: str) -> str:
    try:
        known = [f"{kind}_{number}" for kind in ("sm", "compute") for number in compiler.supported()]
    except KernelUnavailable:
        return text  # compiling says what is missing
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not an architecture of this NVRTC; it knows {', '.join(known)}")
    return text


def _location() -> str:
    from cuda import bindings

    text = f"cuda-bindings {bindings.__version__}"
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:  # the bindings found the library by themselves before they had this package
        return text
    return f"{text}, {load_nvidia_dynamic_lib('nvrtc').abs_path}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m linrnn.kernels.cuda",
        description="Says whether linrnn's CUDA kernels can run here; the exit code is 1 if they cannot. "
        "With --compile, compiles all of them ahead of time, which needs neither a GPU nor a driver.",
        epilog="The cache is $LINRNN_CACHE_DIR, or else linrnn in the user's cache folder; it may be deleted.",
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU to look at (default: 0)")
    parser.add_argument(
        "--compile", type=_architecture, nargs="+", metavar="ARCH", help="architectures to compile for, such as sm_90"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where --compile writes (default: the cache); see also docs/cuda.md"
    )
    options = parser.parse_args(arguments)
    if options.device < 0:
        parser.error(f"--device must be at least 0, got {options.device}")
    if options.out and not options.compile:
        parser.error("--out says where --compile writes: name architectures with --compile")
    return build(options.compile, options.out) if options.compile else diagnose(options.device)


if __name__ == "__main__":
    sys.exit(main())
