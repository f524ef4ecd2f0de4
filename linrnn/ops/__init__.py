"""The recurrences, as functions: `(inputs, initial_state) -> (output, final_state)`."""

from linrnn.ops._backend import BackendUnavailable, FallbackWarning
from linrnn.ops.diagonal_scan import diagonal_scan, reset_from_cu_seqlens

__all__ = ["BackendUnavailable", "FallbackWarning", "diagonal_scan", "reset_from_cu_seqlens"]
