"""The recurrences, as functions: `(inputs, initial_state) -> (output, final_state)`."""

from linrnn.ops._backend import BackendUnavailable, FallbackWarning
from linrnn.ops.diagonal_scan import diagonal_scan, reset_from_cu_seqlens
from linrnn.ops.linear_attention import NormalizedState, linear_attention

__all__ = [
    "BackendUnavailable",
    "FallbackWarning",
    "NormalizedState",
    "diagonal_scan",
    "linear_attention",
    "reset_from_cu_seqlens",
]
