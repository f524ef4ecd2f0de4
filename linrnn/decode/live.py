"""What a piece of code allocates, operation by operation: the bytes that are alive at its worst moment."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the tensor storages made inside a `with` block while they live, on any device.

    ```python
    with LiveBytes() as live:
        model(ids)
    live.peak, live.now  # bytes
    ```

    What was there before does not count, nor what a kernel allocates and frees within one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {id(leaf.untyped_storage()) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()  # one Python object as long as the memory lives
                if id(storage) not in known and id(storage) not in self._counted:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._counted[key]

        self._counted[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
