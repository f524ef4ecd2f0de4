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
    """Notices that a model's parameters or buffers were written to, moved or replaced, about 0.2 us for each of them.

    What goes around torch's count of writes (through `.data`, and fused optimizers) is not noticed.
    """

    def __init__(self, model: nn.Module):
        places = [place for module in model.modules() for place in (module._parameters, module._buffers)]
        self._places = [(place, key) for place in places for key, tensor in place.items() if tensor is not None]
        self._before = self._now()

    def changed(self) -> bool:
        """Says whether something was since this was made."""
        return self._now() != self._before

    def _now(self) -> list[tuple[int, int]]:
        return [_mark(place[key]) for place, key in self._places]


def _mark(tensor: Tensor | None) -> tuple[int, int]:
    """Returns where a tensor is and how often it was written to; tensors of the inference mode do not count that."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
