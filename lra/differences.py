"""What differs between two configurations or two checkpoints, by name; light, so that commands start fast."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def plan_differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """The keys on which two plans differ: `model.d_model is 32 there, 64 here`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*ours, *(k for k in theirs if k not in ours)]
        pairs = ((theirs.get(k), ours.get(k), f"{name}.{k}".lstrip(".")) for k in keys)
        return [difference for pair in pairs for difference in plan_differences(*pair)]
    return [] if theirs == ours else [f"{name} is {theirs!r} there, {ours!r} here"]


def tensor_differences(theirs: "dict[str, Tensor]", ours: "dict[str, Tensor]") -> list[str]:
    """The tensors that two state dictionaries do not share, by name and shape."""
    there, here = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (theirs, ours))
    names = [*here, *(name for name in there if name not in here)]
    found = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in names]
    return [f"{name} is {a} there, {b} here" for name, a, b in found if a != b]
