"""Recurrent decoding: states as values, softmax attention with a chosen memory."""

from linrnn.decode import state
from linrnn.decode.attention import AttentionDecoder, attention
from linrnn.decode.calibration import Calibration
from linrnn.decode.live import LiveBytes
from linrnn.decode.plan import Choice, NoPlan, Plan, plan

__all__ = ["AttentionDecoder", "Calibration", "Choice", "LiveBytes", "NoPlan", "Plan", "attention", "plan", "state"]
