"""Byte-level language models of six mixers at equal parameters, trained on the same bytes and compared.

    python examples/byte_lm.py train --preset cpu                 # the source files of Python's standard library
    python examples/byte_lm.py train --preset gpu my/texts a.txt  # files, and the files below folders
    python examples/byte_lm.py report                             # table and plot of what is there, also of a half run
    python examples/byte_lm.py sample --mixer gau --prompt "def "

Every training run ("cell") writes one result file when it is done, so that a command that was interrupted goes on where
it was. Seeds come one after the other: the first is whole before the second begins.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from byte_language_model import corpus as texts
from byte_language_model import mixers, report
from byte_language_model.settings import OPTIONS, PRESETS, Settings
from byte_language_model.training import Cell, DivergedError, run

from linrnn.models import LanguageModel


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.action(args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="train | report | sample")
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, default=Path("runs/byte_lm"), help="folder of results (%(default)s)")

    one = commands.add_parser("train", parents=[out], help="train what has no result yet, then report and sample")
    one.add_argument("text", nargs="*", help="files or folders (Python's standard library if none)")
    one.add_argument("--pattern", help='which files of folders, for example "*.txt" (all)')
    one.add_argument("--preset", choices=PRESETS, default="cpu")
    one.add_argument("--mixers", nargs="+", default=list(mixers.MIXERS), metavar="NAME", help="of %(default)s")
    one.add_argument("--seeds", type=int, default=2, help="how many (%(default)s)")
    for name, kind in (("lengths", int), ("rates", float)):
        one.add_argument(f"--{name}", type=kind, nargs="+", help="instead of the preset's")
    for name in ("d-model", "n-layers", "cell-bytes", "trial-bytes", "batch-bytes"):
        one.add_argument(f"--{name}", type=int, help="instead of the preset's")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    one.add_argument("--threads", type=int, help="of the CPU")
    one.add_argument("--no-samples", action="store_true", help="prints no text of the models at the end")
    one.set_defaults(action=train)

    one = commands.add_parser("report", parents=[out], help="table and plot of the results")
    one.add_argument("--write", type=Path, help="PATH.md and PATH.png, without suffix (OUT/report)")
    one.set_defaults(action=lambda args: report.write(args.out, args.write or args.out / "report"))

    one = commands.add_parser("sample", parents=[out], help="text that trained models write")
    one.add_argument("--mixer", default=None, help="only this one")
    one.add_argument("--prompt", default="def ")
    one.add_argument("--bytes", type=int, default=200, help="how many to write (%(default)s)")
    one.add_argument("--temperature", type=float, default=0.7)
    one.set_defaults(action=sample)
    return top


def train(args: argparse.Namespace) -> None:
    """Chooses each mixer's learning rate, then trains all cells, seed by seed."""
    settings = settings_of(args)
    unknown = [name for name in args.mixers if name not in mixers.MIXERS]
    if unknown:
        raise ValueError(f"--mixers: expected some of {', '.join(mixers.MIXERS)}, got {', '.join(unknown)}")
    if args.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {args.seeds}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    corpus = texts.load(args.text, args.pattern)
    texts.check_long_enough(corpus, settings.longest)
    print(f"text: {corpus.describe()}", flush=True)
    total = len(args.mixers) * (args.seeds * len(settings.lengths) + len(settings.rates) * (len(settings.rates) > 1))
    began, done = time.perf_counter(), 0

    def show(name: str):
        def line(text: str) -> None:
            print(f"[{done + 1} of {total}, {(time.perf_counter() - began) / 60:.1f} min] {name}: {text}", flush=True)

        return line

    rates = {}
    for mixer in args.mixers:
        tried: dict[float, float] = {}
        for rate in settings.rates if len(settings.rates) > 1 else ():
            cell = Cell(mixer, min(settings.lengths), 0, rate, settings.trial_bytes)
            path = args.out / "rates" / f"{mixer}-{rate:g}.json"
            try:
                line = show(f"{mixer}, rate {rate:g}")
                result = run(cell, settings, corpus, path, device=args.device, trial=True, progress=line)
                tried[rate] = result["curve"][-1][-1]
            except DivergedError as error:
                print(error, flush=True)
            done += 1
        if len(settings.rates) > 1 and not tried:
            raise DivergedError(f"{mixer}: none of the rates {settings.rates} keeps the loss finite; try lower --rates")
        rates[mixer] = min(tried, key=tried.__getitem__) if tried else settings.rates[0]
    for seed in range(args.seeds):
        for length in settings.lengths:
            for mixer in args.mixers:
                cell = Cell(mixer, length, seed, rates[mixer], settings.cell_bytes)
                path = args.out / f"{cell.name}.json"
                run(cell, settings, corpus, path, device=args.device, progress=show(cell.name))
                done += 1
    report.write(args.out, args.out / "report")
    if not args.no_samples:
        main(["sample", "--out", str(args.out)])


def settings_of(args: argparse.Namespace) -> Settings:
    """The preset with what the command line says instead."""
    given: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    return replace(PRESETS[args.preset], **{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def sample(args: argparse.Namespace) -> None:
    """Prints what the models with the longest window and the first seed write."""
    results = report.read(args.out)
    longest = max(result["cell"]["length"] for result in results)
    names = [r["cell"]["mixer"] for r in results if r["cell"]["length"] == longest and r["cell"]["seed"] == 0]
    if args.mixer is not None and args.mixer not in names:
        raise ValueError(f"--mixer: expected one of {', '.join(names)}, got {args.mixer!r}")
    prompt = torch.tensor([list(args.prompt.encode())])
    if not prompt.numel():
        raise ValueError("--prompt: expected at least one byte, got none")
    for name in names if args.mixer is None else [args.mixer]:
        model = LanguageModel.from_pretrained(args.out / f"{name}-{longest}-seed0").eval()
        ids = model.generate(prompt, args.bytes, temperature=args.temperature, seed=0)
        print(f"--- {mixers.LABELS[name]}\n{bytes(ids[0].tolist()).decode(errors='replace')}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError, DivergedError) as error:
        sys.exit(f"error: {error}")
