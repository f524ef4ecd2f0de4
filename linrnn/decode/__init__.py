"""Recurrent decoding: states as values."""

from linrnn.decode import state

__all__ = ["state"]
