"""The recurrences, as functions: `(inputs, initial_state) -> (output, final_state)`."""

from linrnn.ops._backend import BackendUnavailable, FallbackWarning
from linrnn.ops.causal_conv1d import causal_conv1d
from linrnn.ops.delta_rule import delta_rule
from linrnn.ops.diagonal_scan import diagonal_scan, reset_from_cu_seqlens
from linrnn.ops.diagonal_ssm import diagonal_ssm, diagonal_ssm_bidirectional
from linrnn.ops.diagonal_step import diagonal_step
from linrnn.ops.fft_conv import fft_conv
from linrnn.ops.linear_attention import NormalizedState, linear_attention
from linrnn.ops.rwkv7 import rwkv7
from linrnn.ops.selective_scan import selective_scan
from linrnn.ops.softmax_scan import SoftmaxState, softmax_merge, softmax_scan
from linrnn.ops.wkv import WKVState, wkv

__all__ = [
    "BackendUnavailable",
    "FallbackWarning",
    "NormalizedState",
    "SoftmaxState",
    "WKVState",
    "causal_conv1d",
    "delta_rule",
    "diagonal_scan",
    "diagonal_ssm",
    "diagonal_ssm_bidirectional",
    "diagonal_step",
    "fft_conv",
    "linear_attention",
    "reset_from_cu_seqlens",
    "rwkv7",
    "selective_scan",
    "softmax_merge",
    "softmax_scan",
    "wkv",
]
