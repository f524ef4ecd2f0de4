"""Launches the generator of Pathfinder images: tables in, images and what is in them out, one C call per block."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linrnn.kernels.cpu import library

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray[Any, Any]]

TABLES = (
    *("ink", "mask", "dilated", "limit", "clear", "turn", "candidate", "advance", "seed_head", "seed_pivot", "circle"),
    *("seeded", "border", "border_dilated", "disc"),
)
NUMBERS = (
    *("size", "pad", "margins", "seed_distance", "paddles", "distractors", "distractor_paddles"),
    *("every_direction", "target", "distractor", "marker", "seed", "first", "count", "attempts"),
)
OUTPUTS = ("images", "labels", "margin", "bars", "marked", "tried")


class _Stamps(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("margin", "reach", "candidates")),
        *((name, ctypes.c_void_p) for name in TABLES),
    ]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64 if name == "seed" else ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in OUTPUTS),
    ]


def generate(numbers: dict[str, int], stamps: Sequence[Any], out: Arrays) -> int:
    """Fills `out` with the images first .. first + count - 1, on the calling thread and without the interpreter's lock.

    Args:
        numbers: the fields of LinrnnPathfinder that are numbers, but for `margins`.
        stamps: tables of each margin, with `margin`, `reach` and the C-contiguous arrays named in TABLES.
        out: the arrays named in OUTPUTS, C-contiguous, of the types and shapes of LinrnnPathfinder.

    Returns:
        0, or 1 + the number of the image for which no pair of chains was found.

    Raises:
        KernelUnavailable: linrnn was installed without its CPU library.
    """
    call = library().linrnn_pathfinder
    call.restype = ctypes.c_int64
    tables = (_Stamps * len(stamps))()
    for to, given in zip(tables, stamps, strict=True):
        to.margin, to.reach, to.candidates = given.margin, given.reach, len(given.candidate)
        for name in TABLES:
            setattr(to, name, getattr(given, name).ctypes.data)
    arguments = _Arguments(margins=len(stamps), **numbers)
    for name in OUTPUTS:
        setattr(arguments, name, out[name].ctypes.data)
    return int(call(ctypes.byref(arguments), tables))
