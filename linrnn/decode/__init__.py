"""Recurrent decoding: states as values, softmax attention with a chosen memory."""

from linrnn.decode import state
from linrnn.decode.attention import AttentionDecoder, attention
from linrnn.decode.live import LiveBytes

__all__ = ["AttentionDecoder", "LiveBytes", "attention", "state"]
