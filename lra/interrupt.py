"""Ctrl-C, a batch system's signal or a deadline as an order to save and leave, not as a crash."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TIME_UP = 14  # SIGALRM, by number since Windows has none: the deadline of `until` has passed


class Interrupted(Exception):
    """A run stopped by a signal or a deadline; `str` says where it stands and how to go on."""

    def __init__(self, message: str, signum: int = signal.SIGINT):
        super().__init__(message, signum)  # both, or a pickled copy from a worker process would lose the signal
        self.signum = signum
        self.code = 128 + signum  # 130 for Ctrl-C, the shell's convention

    def __str__(self) -> str:
        return str(self.args[0])


_deadline: float | None = None


@contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Has every run inside stop, as after a signal, once `time.monotonic()` reaches `deadline`; None for never."""
    global _deadline
    before, _deadline = _deadline, deadline
    try:
        yield
    finally:
        _deadline = before


def deadline() -> float | None:
    """The deadline of `until`, for processes that are started inside."""
    return _deadline


def time_is_up() -> bool:
    """Whether the deadline of `until` has passed."""
    return _deadline is not None and time.monotonic() >= _deadline


class Flag:
    """`signum` is the first signal received, `TIME_UP` once the deadline of `until` has passed, or None."""

    def __init__(self) -> None:
        self.received: list[int] = []

    @property
    def signum(self) -> int | None:
        if not self.received and time_is_up():
            self.received.append(TIME_UP)
        return self.received[0] if self.received else None


@contextmanager
def listening() -> Iterator[Flag]:
    """Collects SIGINT and SIGTERM in a `Flag` instead of raising.

    A second one changes nothing: it must not cut short the saving that the first has ordered. SIGUSR1 and SIGUSR2, by
    which batch systems announce a timeout or a preemption, are collected too if somebody handles them, and handed on
    to that handler, which may requeue the job, once the state is saved.
    """
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # Python delivers signals to the main thread only
        return

    announced = [s for name in ("SIGUSR1", "SIGUSR2") if (s := getattr(signal, name, None)) is not None]
    handed_on = [s for s in announced if callable(signal.getsignal(s))]
    watched = [signal.SIGINT, signal.SIGTERM, *handed_on]
    before = {s: signal.getsignal(s) for s in watched}

    def receive(signum: int, frame: FrameType | None) -> None:
        flag.received.append(signum)

    for s in watched:
        signal.signal(s, receive)
    try:
        yield flag
    finally:
        for s in watched:
            signal.signal(s, before[s])
        for s in handed_on:
            if s in flag.received:
                signal.raise_signal(s)
