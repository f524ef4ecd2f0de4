"""A memo for things that are dear to make and must be made once: compiled programs, loaded modules, contexts."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Once(dict[K, V], Generic[K, V]):
    """A dictionary that makes a missing value with `make(key)`, once even if several threads ask for it together.

    An exception reaches every asker and nothing is kept, so that the next one tries again.
    """

    def __init__(self, make: Callable[[K], V]):
        super().__init__()
        self._make = make
        self._guard = threading.Lock()
        self._locks: dict[K, threading.Lock] = {}

    def __missing__(self, key: K) -> V:
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # not the guard: different keys are made at the same time
            if key not in self:
                self[key] = self._make(key)
            return self[key]
