"""Recurrent decoding: generation, states as values, softmax attention with a chosen memory."""

from linrnn.decode import state
from linrnn.decode.attention import AttentionDecoder, attention
from linrnn.decode.calibration import Calibration
from linrnn.decode.decoder import Decoder
from linrnn.decode.generation import generate
from linrnn.decode.live import LiveBytes
from linrnn.decode.plan import Choice, NoPlan, Plan, plan
from linrnn.decode.sampling import Sampling

__all__ = [
    "AttentionDecoder",
    "Calibration",
    "Choice",
    "Decoder",
    "LiveBytes",
    "NoPlan",
    "Plan",
    "Sampling",
    "attention",
    "generate",
    "plan",
    "state",
]
