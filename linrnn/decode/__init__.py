"""Recurrent decoding: generation, states as values, softmax attention with a chosen memory."""

from linrnn.decode import state
from linrnn.decode.attention import AttentionDecoder, attention
from linrnn.decode.calibration import Calibration
from linrnn.decode.decoder import Decoder
from linrnn.decode.generation import generate
from linrnn.decode.graph import GraphedStep, GraphedSteps
from linrnn.decode.live import LiveBytes
from linrnn.decode.plan import Choice, NoPlan, Plan, plan
from linrnn.decode.prefix_cache import PrefixCache
from linrnn.decode.sampling import Sampling
from linrnn.decode.speculative import Acceptance, speculative

__all__ = [
    "Acceptance",
    "AttentionDecoder",
    "Calibration",
    "Choice",
    "Decoder",
    "GraphedStep",
    "GraphedSteps",
    "LiveBytes",
    "NoPlan",
    "Plan",
    "PrefixCache",
    "Sampling",
    "attention",
    "generate",
    "plan",
    "speculative",
    "state",
]
