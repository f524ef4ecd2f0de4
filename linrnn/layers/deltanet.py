"""DeltaNet (Schlag et al. 2021, arXiv:2102.11174; in parallel: Yang et al. 2024, arXiv:2406.06484).

    q_t, k_t, v_t = silu(conv(W x))_t        q and k of length 1 per head;  β_t = σ(W_β x_t), or 2 σ(W_β x_t)
    S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}^T k_t)^T        a step of gradient descent on |S^T k_t - v_t|² / 2
    y_t = W_o RMSNorm(S_t^T q_t / sqrt(K))                 per head; use_gate: times silu(W_g x_t)

S is one K x V matrix per head, whose transition I - β_t k_t k_t^T has the eigenvalue 1 - β_t in (0, 1) along k_t. With
allow_neg_eigval it lies in (-1, 1), and the layer can follow states that alternate (arXiv:2411.12537).
"""

from linrnn.layers.delta_layer import DeltaLayer


class DeltaNet(DeltaLayer):
    """Linear attention that overwrites: writing under a key first removes what that key held.

    The state is a DeltaState: S (B, H, K, V), and the last inputs of the short convolution.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads; if None, at least 4 heads as wide as 64 allows.
        d_key, d_value: widths K and V of a head's keys and values; D / H if None.
        conv: what a short convolution runs over, "none", "k" or "qkv".
        conv_width: length of its filters.
        allow_neg_eigval: doubles β.
        use_gate: gates the output with silu(W_g x), as in the gated DeltaNet.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        conv: str = "qkv",
        conv_width: int = 4,
        allow_neg_eigval: bool = False,
        use_gate: bool = False,
    ):
        super().__init__(
            d_model,
            n_heads=n_heads,
            d_key=d_key,
            d_value=d_value,
            conv=conv,
            conv_width=conv_width,
            allow_neg_eigval=allow_neg_eigval,
            use_gate=use_gate,
        )
        self.reset_parameters()
