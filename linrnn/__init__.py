"""Linear RNNs and state-space models for PyTorch: one recurrence, three ways to run it, one answer.

Dimension legend, the same in every docstring, comment and einsum of the package:
B batch, T time, D width, N state, H heads, K key, V value, C chunk.
"""

__version__ = "0.1.0"

from linrnn import decode, layers, models, ops
from linrnn.flops import crossover, flops

__all__ = ["__version__", "crossover", "decode", "flops", "layers", "models", "ops"]
