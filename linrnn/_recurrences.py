"""What layers multiply to mix tokens, and by weights that are in no module: see `linrnn.flops` for what counts."""

import functools

from linrnn.layers import (
    GLA,
    HGRN,
    RGLRU,
    RWKV4,
    RWKV7,
    S4D,
    S5,
    Attention,
    ComplexRWKV,
    GatedDeltaNet,
    Mamba,
    Mamba2,
    Mega,
    Performer,
    RecurrentLayer,
    RetNet,
)
from linrnn.layers.delta_layer import DeltaLayer
from linrnn.layers.feature_maps import FEATURE_MAPS
from linrnn.layers.flash import FLASH
from linrnn.layers.gau import GAU
from linrnn.layers.linear_attention import KernelAttention
from linrnn.layers.nystrom import Nystrom
from linrnn.layers.ring import RingRNN
from linrnn.layers.wkv_mix import WKVMix


class Length(int):
    """A number of tokens that notes where costs bend: the lengths at which a window or a chunk is full."""

    kinks: set[int]
    added: int

    def __new__(cls, T: int, kinks: set[int] | None = None, added: int = 0) -> "Length":
        length = super().__new__(cls, T)
        length.kinks, length.added = set() if kinks is None else kinks, added
        return length

    def most(self, full: int | None) -> int:
        """Returns the smaller of T and `full`; None is no bound."""
        if full is None:
            return int(self)
        self.kinks.add(full - self.added)
        return min(int(self), full)

    def plus(self, n: int) -> "Length":
        """Returns the length of a sequence with n more tokens."""
        return Length(self + n, self.kinks, self.added + n)


@functools.singledispatch
def weights(layer: object) -> int:
    """Returns the products of a token with weights that are in no module of their own."""
    return 0


@weights.register(RingRNN)
@weights.register(S5)
def _(layer) -> int:
    return layer.B.numel() + layer.C.numel()


@weights.register
def _(layer: RGLRU) -> int:
    return layer.input_gate_weight.numel() + layer.recurrent_gate_weight.numel()


@weights.register
def _(layer: RWKV7) -> int:
    return sum(w.numel() for w in (layer.w1, layer.w2, layer.a1, layer.a2, layer.g1, layer.g2))


@weights.register
def _(layer: KernelAttention) -> int:
    K = layer.d_key
    return layer.n_heads * K * (K + 1) if layer.kind is FEATURE_MAPS["taylor"] else 0  # k_i k_j, and of q


@weights.register
def _(layer: Performer) -> int:
    return 2 * layer.n_heads * layer.omega.numel()


@functools.singledispatch
def recurrence(layer: object, T: Length) -> int:
    """Returns what mixes the T tokens of a layer, without the modules within."""
    raise unknown(layer)


@recurrence.register
def _(layer: RingRNN, T: Length) -> int:
    return T * layer.d_state * (4 if layer.pair else 1)  # λ h


@recurrence.register
def _(layer: S4D, T: Length) -> int:
    return T * layer.A_imag.numel() * 8 * ways(layer)  # Ā h 4, B̄ x 2, Re(C h) 2


@recurrence.register
def _(layer: S5, T: Length) -> int:
    return T * len(layer.Lambda_re) * 4 * ways(layer)  # Λ̄ h


@recurrence.register
def _(layer: RGLRU, T: Length) -> int:
    return T * layer.d_model * 3  # a h, i x, sqrt(1 - a²) (i x)


@recurrence.register
def _(layer: HGRN, T: Length) -> int:
    if layer.theta is None:
        return T * layer.d_state * (1 + ways(layer))  # (1 - λ) c, λ h
    return T * layer.d_state * (4 + 4 * ways(layer))  # (1 - λ) c 2, λ e^{iθ} 2, its product with h 4


@recurrence.register
def _(layer: KernelAttention, T: Length) -> int:
    F, V, kind = layer.n_features, layer.d_head, layer.kind
    read = F if kind.normalize and not kind.each else 0  # q z
    units = F * V + F if kind.logs and layer.causal else 0  # S and z, whose units are the running maximum's
    return T * layer.n_heads * (2 * F * V + read + units)  # k v, q S


@recurrence.register
def _(layer: RetNet, T: Length) -> int:
    return T * layer.n_heads * 3 * layer.d_key * layer.d_value  # γ S, k v, q S


@recurrence.register
def _(layer: GLA, T: Length) -> int:
    return T * layer.n_heads * 3 * layer.d_key * layer.d_value  # α S, k v, q S


@recurrence.register
def _(layer: Mamba, T: Length) -> int:
    return T * layer.d_inner * (4 * layer.d_state + 1)  # Δ x, (Δ x) B, Δ A, exp(Δ A) h, C h


@recurrence.register
def _(layer: Mamba2, T: Length) -> int:
    K, V = layer.d_state, layer.d_inner // layer.n_heads
    return T * layer.n_heads * (3 * K * V + V + 1)  # exp(Δ A) h, B (Δ x), C h; Δ x; Δ A


@recurrence.register
def _(layer: DeltaLayer, T: Length) -> int:
    K, V = layer.d_key, layer.d_value
    decay = K * V if isinstance(layer, GatedDeltaNet) else 0
    return T * layer.n_heads * (3 * K * V + V + decay)  # S k, k (β (v - S k)), q S; β (v - S k)


@recurrence.register
def _(layer: RWKV7, T: Length) -> int:
    K = layer.d_head
    return T * layer.n_heads * (5 * K * K + K)  # w S, κ̂ S, (a κ̂) (κ̂ S), k v, r S; a κ̂


@recurrence.register(WKVMix)
@recurrence.register(RWKV4)
def _(layer, T: Length) -> int:
    # in units of the running maximum: a factor of a, one of b and one of v, and the same again for what is read, of
    # which the complex layer takes the real part
    return T * layer.d_state * (10 if isinstance(layer, ComplexRWKV) else 6)


@recurrence.register
def _(layer: Attention, T: Length) -> int:
    window = layer.window
    if window is not None:
        window = window + layer.sink if layer.causal or layer.half_causal else 2 * window - 1
    return T * T.most(window) * 2 * layer.n_heads * layer.d_head


@recurrence.register
def _(layer: Mega, T: Length) -> int:
    return T * T.most(layer.chunk_size) * (layer.d_key + layer.d_value)


@recurrence.register
def _(layer: GAU, T: Length) -> int:
    return T * T * (layer.d_key + layer.d_value)


@recurrence.register
def _(layer: FLASH, T: Length) -> int:
    K, V = layer.d_key, layer.d_value
    return T * (T.most(layer.chunk_size) * (K + V) + 2 * K * V)  # within the chunk; k' v, q' S


@recurrence.register
def _(layer: Nystrom, T: Length) -> int:
    D, M = layer.d_model, T.most(layer.n_landmarks)
    inverse = 4 * layer.n_iterations * layer.n_heads * M**3
    filters = 0 if layer.conv is None else T * D * layer.conv.shape[1]
    return 4 * T * M * D + 2 * M**2 * D + inverse + filters  # F and B with what they read; A, Z (B V)


def ways(layer: RecurrentLayer) -> int:
    """How many scans a layer runs: one, or one each way."""
    return 1 if layer.causal else 2


def unknown(module: object) -> TypeError:
    return TypeError(
        f"layer: no count is known of {type(module).__name__}; give it a method multiplications(T) that returns the "
        "pair (projections, recurrence), that of its submodules included"
    )
