"""Ctrl-C as an order to save and leave, not as a crash."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A run stopped by a signal; `str` says where it stands and how to go on."""

    def __init__(self, message: str, signum: int = signal.SIGINT):
        super().__init__(message)
        self.code = 128 + signum  # 130 for Ctrl-C, the shell's convention


class Flag:
    """`signum` is the first SIGINT or SIGTERM received, or None."""

    signum: int | None = None


@contextmanager
def listening() -> Iterator[Flag]:
    """Collects SIGINT and SIGTERM in a `Flag` instead of raising.

    A second one changes nothing: it must not cut short the saving that the first has ordered.
    """
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # Python delivers signals to the main thread only
        return

    watched = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.getsignal(s) for s in watched}

    def receive(signum: int, frame: FrameType | None) -> None:
        if flag.signum is None:
            flag.signum = signum

    for s in watched:
        signal.signal(s, receive)
    try:
        yield flag
    finally:
        for s in watched:
            signal.signal(s, before[s])
