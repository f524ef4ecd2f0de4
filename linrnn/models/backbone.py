"""A stack of mixers and gated feed-forward networks with residual connections."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from linrnn import layers
from linrnn.layers.base import RecurrentLayer, State, blank_padding, positive_int


class SequenceBackbone(RecurrentLayer):
    """Maps x (B, T, d_model) to features (B, T, d_model); its state is the tuple of its layers' states.

    Each block is x + mixer(norm(x)), then x + ffn(norm(x)), with a norm at the end; with prenorm=False it is
    norm(x + mixer(x)), then norm(x + ffn(x)), and nothing at the end. It keeps the contract of a layer.

    Args:
        mixer: registry name of the mixing layer, or a list of at most n_layers names, which repeats (a hybrid).
        d_model: width D.
        n_layers: number of blocks.
        mixer_kwargs: keyword arguments of the mixer; for a list of mixers, {name: keyword arguments}.
        ffn_expand: hidden width of the gated feed-forward network relative to d_model (rounded to a multiple of 8).
        norm: "rms" or "layer".
        prenorm: normalise before each sublayer (else after it).
        dropout: probability of dropping an output of a mixer or feed-forward network in training.
        bidirectional: every mixer looks both ways, in two halves (`layers.Bidirectional`) where it has no such option;
            such a backbone cannot step.
    """

    state_type = tuple

    def __init__(
        self,
        mixer: str | Sequence[str],
        d_model: int,
        n_layers: int,
        *,
        mixer_kwargs: Mapping[str, Any] | None = None,
        ffn_expand: float = 2.0,
        norm: str = "rms",
        prenorm: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ):
        super().__init__(d_model)
        names = mixer_names(mixer, positive_int("n_layers", n_layers))
        per_mixer = {mixer: mixer_kwargs or {}} if isinstance(mixer, str) else dict(mixer_kwargs or {})
        stray = sorted(set(per_mixer) - set(names))
        if stray:
            raise ValueError(f"mixer_kwargs: expected some of {sorted(set(names))} for a list of mixers, got {stray}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
        self.blocks = nn.ModuleList(
            Block(
                build_mixer(name, d_model, per_mixer.get(name, {}), bidirectional),
                ffn_expand=ffn_expand,
                norm=norm,
                prenorm=prenorm,
                dropout=dropout,
            )
            for name in names
        )
        self.norm = build_norm(norm, d_model) if prenorm else nn.Identity()
        self.causal = all(mixer.causal for mixer in self.mixers)

    @property
    def mixers(self) -> list[RecurrentLayer]:
        """The mixing layers, first to last."""
        return [cast(RecurrentLayer, block.mixer) for block in self.blocks]

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        states = []
        for i, block in enumerate(self.blocks):
            x, final = block(x, None if state is None else state[i], reset=reset, mask=mask)
            states.append(final)
        return self.norm(x), tuple(states) if self.causal else None

    def init_state(self, batch_size: int) -> State:
        self.require_causal("init_state")
        return tuple(mixer.init_state(batch_size) for mixer in self.mixers)

    @property
    def state_size(self) -> int | None:
        total = 0
        for mixer in self.mixers:
            size = mixer.state_size
            if size is None:
                return None
            total += size
        return total

    def check_state(self, state: State, batch_size: int) -> None:
        if not self.causal:
            raise ValueError("state: a bidirectional backbone takes none, it sees the whole sequence; expected None")
        if not isinstance(state, tuple) or len(state) != len(self.blocks):
            raise TypeError(f"state: expected a tuple of {len(self.blocks)} layer states or None, got {type(state)}")


class Block(nn.Module):
    """One mixer and one gated feed-forward network, each with its norm and residual connection."""

    def __init__(self, mixer: RecurrentLayer, *, ffn_expand: float, norm: str, prenorm: bool, dropout: float):
        super().__init__()
        self.prenorm = prenorm
        self.mixer = mixer
        self.ffn = GatedFFN(mixer.d_model, ffn_expand)
        self.mixer_norm = build_norm(norm, mixer.d_model)
        self.ffn_norm = build_norm(norm, mixer.d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) to y (B, T, D) and the mixer's final state."""
        y, state = self.mixer(self.mixer_input(x), state, reset=reset, mask=mask)
        return self.finish(x, y), state

    def mixer_input(self, x: Tensor) -> Tensor:
        """Maps the block's input to the mixer's."""
        return self.mixer_norm(x) if self.prenorm else x

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Maps the block's input x and the mixer's output y to the block's output: token by token from here on."""
        x = x + self.dropout(y)
        if self.prenorm:
            return x + self.dropout(self.ffn(self.ffn_norm(x)))
        x = self.mixer_norm(x)
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class GatedFFN(nn.Module):
    """y = W_out (silu(W_gate x) * W_in x), without biases (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, d_model: int, expand: float):
        super().__init__()
        if not expand > 0:
            raise ValueError(f"ffn_expand: expected a number > 0, got {expand}")
        hidden = max(8, 8 * round(expand * d_model / 8))
        self.gate_in = nn.Linear(d_model, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., D) to y (..., D)."""
        gate, value = self.gate_in(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


def build_norm(norm: str, d_model: int) -> nn.Module:
    """Returns the normalisation called "rms" or "layer"."""
    if norm == "rms":
        return nn.RMSNorm(d_model, eps=1e-6)
    if norm == "layer":
        return nn.LayerNorm(d_model)
    raise ValueError(f'norm: expected "rms" or "layer", got {norm!r}')


def build_mixer(name: str, d_model: int, kwargs: Mapping[str, Any], bidirectional: bool) -> RecurrentLayer:
    """Builds a registered layer that looks one way or both ways: by itself, or as `layers.Bidirectional`."""
    if not bidirectional:
        return layers.build(name, d_model, **kwargs)
    if "bidirectional" in layers.options(name):
        return layers.build(name, d_model, **{**kwargs, "bidirectional": True})
    return layers.Bidirectional(name, d_model, **kwargs)


def mixer_names(mixer: str | Sequence[str], n_layers: int) -> list[str]:
    """Returns one registry name per block."""
    pattern = [mixer] if isinstance(mixer, str) else list(mixer)
    if not 1 <= len(pattern) <= n_layers:
        raise ValueError(f"mixer: expected a name or 1 to n_layers = {n_layers} names, got {len(pattern)} names")
    return list(islice(cycle(pattern), n_layers))
