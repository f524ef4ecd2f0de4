"""The bare token mixing of RWKV-4, without its token shift: a ratio of two SLRUs (kexue.fm 9554).

    y_t = λ y_{t-1} + e^{k_t} v_t        z_t = λ z_{t-1} + e^{k_t}
    o_t = σ(r_t) [y_t + (γλ - 1) e^{k_t} v_t] / [z_t + (γλ - 1) e^{k_t}]        out_t = W_o o_t

r_t = W_r x_t, k_t = W_k x_t, v_t = W_v x_t; λ = exp(-exp(nu_log)) and γ = exp(gamma_log) are real, one per channel. The
numerator is λ (y_{t-1} + e^{u + k_t} v_t) with u = gamma_log, and so is the denominator without v: RWKV-4
(arXiv:2305.13048) with decay λ and bonus u. γ need not normalise, since the ratio does.
"""

from linrnn.layers.wkv_mix import WKVMix


class TokenMix(WKVMix):
    """Weighted mean of the values so far, with weights e^{k} that decay with the distance, gated by σ(r).

    The state is a WKVState of (B, N) each: a = y and b = z in units of exp(p), p their running maximum, so that keys of
    any size are exact.

    Args:
        d_model: width D of input and output.
        d_state: number N of channels; d_model if None (4 D² parameters, as softmax attention).
        r_min, r_max: the interval in which the decays λ start (λ² uniform).
        lr_scale: learning rate of nu_log and gamma_log relative to the rest.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        lr_scale: float = 0.5,
    ):
        super().__init__(d_model, d_state=d_state, r_min=r_min, r_max=r_max, lr_scale=lr_scale)
        self.reset_parameters()
