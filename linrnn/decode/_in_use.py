"""A model while it decodes: in evaluation mode, and with the parameters its frozen step was made of."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

_LOCK = threading.Lock()
_EVALUATED: dict[nn.Module, int] = {}  # modules that were training, and by how many they are used now


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Sets modules to evaluation mode (no dropout), and those back that were training when nobody uses them any more.

    Several threads may do so at once.
    """
    with _LOCK:
        held = [module for module in modules if module.training or module in _EVALUATED]
        for module in held:
            _EVALUATED[module] = _EVALUATED.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in held:
                _EVALUATED[module] -= 1
                if not _EVALUATED[module]:
                    del _EVALUATED[module]
                    module.training = True


class Watch:
    """Notices that a model's parameters or buffers were written to, moved or replaced.

    What goes around torch's count of writes (through `.data`, and fused optimizers) is not noticed.
    """

    def __init__(self, model: nn.Module):
        places = [place for module in model.modules() for place in (module._parameters, module._buffers)]
        self._places = [(place, key) for place in places for key, tensor in place.items() if tensor is not None]
        tensors = self._tensors()
        self._counted = not any(tensor.is_inference() for tensor in tensors)  # those made in inference mode are not
        self._pointers, self._versions = [tensor.data_ptr() for tensor in tensors], self._count(tensors)

    def changed(self) -> bool:
        """Says whether something was since this was made."""
        tensors = self._tensors()
        return self._pointers != [tensor.data_ptr() for tensor in tensors] or self._versions != self._count(tensors)

    def _tensors(self) -> list[Tensor]:
        return [tensor for place, key in self._places if (tensor := place.get(key)) is not None]

    def _count(self, tensors: list[Tensor]) -> int:
        """Returns how often tensors were written to, which only grows."""
        return sum([tensor._version for tensor in tensors]) if self._counted else 0
