"""A stack of mixers and feed-forward networks with residual connections."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, cast

from torch import Tensor, nn

from linrnn import layers
from linrnn.layers.base import RecurrentLayer, State, StepFn, blank_padding, positive_int
from linrnn.layers.frozen import CannotEmit, emit
from linrnn.layers.frozen import norm as emit_norm
from linrnn.models.block import Block, build_norm
from linrnn.models.ffn import build_ffn
from linrnn.ops.step_program import Ref, StepProgram


class SequenceBackbone(RecurrentLayer):
    """Maps x (B, T, d_model) to features (B, T, d_model); its state is the tuple of its blocks' states.

    Each block is x + mixer(norm(x)), then x + ffn(norm(x)), with a norm at the end; with prenorm=False it is
    norm(x + mixer(x)), then norm(x + ffn(x)), and nothing at the end. It keeps the contract of a layer. A block's state
    is its mixer's, or `BlockState` where the feed-forward network has one too.

    Args:
        mixer: registry name of the mixing layer, or a list of at most n_layers names, which repeats (a hybrid).
        d_model: width D.
        n_layers: number of blocks.
        mixer_kwargs: keyword arguments of the mixer; for a list of mixers, {name: keyword arguments}.
        ffn: "swiglu" or "geglu" (gated), "channel_mix" (RWKV-4's, `layers.ChannelMix`), or None (Mamba has none).
        ffn_expand: hidden width of a gated network relative to d_model (rounded to a multiple of 8); twice that is the
            hidden width of channel_mix.
        ffn_kwargs: "bias" (gated networks) and "d_hidden", a hidden width instead of ffn_expand.
        norm: "rms" or "layer".
        norm_eps: added to the mean square or variance; 1e-6 for "rms" and 1e-5 for "layer" if None.
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
        ffn: str | None = "swiglu",
        ffn_expand: float = 2.0,
        ffn_kwargs: Mapping[str, Any] | None = None,
        norm: str = "rms",
        norm_eps: float | None = None,
        prenorm: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ):
        super().__init__(d_model)
        names = mixer_names(mixer, positive_int("n_layers", n_layers))
        if mixer_kwargs is not None and not isinstance(mixer_kwargs, Mapping):
            raise TypeError(f"mixer_kwargs: expected a mapping of keyword arguments or None, got {mixer_kwargs!r}")
        per_mixer = {mixer: mixer_kwargs or {}} if isinstance(mixer, str) else dict(mixer_kwargs or {})
        stray = sorted(set(per_mixer) - set(names))
        if stray:
            raise ValueError(f"mixer_kwargs: expected some of {sorted(set(names))} for a list of mixers, got {stray}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
        self.blocks = nn.ModuleList(
            Block(
                build_mixer(name, d_model, per_mixer.get(name, {}), bidirectional),
                build_ffn(ffn, d_model, ffn_expand, ffn_kwargs or {}),
                norm=norm,
                norm_eps=norm_eps,
                prenorm=prenorm,
                dropout=dropout,
            )
            for name in names
        )
        self.norm = build_norm(norm, d_model, norm_eps) if prenorm else nn.Identity()
        self.causal = all(mixer.causal for mixer in self.mixers)
        if not self.causal and any(isinstance(block.ffn, RecurrentLayer) for block in self.blocks):
            raise ValueError(
                f"ffn, bidirectional: these exclude each other, {ffn!r} looks back; expected a gated network"
            )

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
        return tuple(cast(Block, block).init_state(batch_size) for block in self.blocks)

    def uncompiled_step(self) -> StepFn:
        """Returns the frozen steps of the blocks, one after the other."""
        steps = [cast(Block, block).frozen_step() for block in self.blocks]

        def step(x: Tensor, state: State) -> tuple[Tensor, State]:
            after = []
            for block_step, before in zip(steps, state, strict=True):
                x, final = block_step(x, before)
                after.append(final)
            return self.norm(x), tuple(after)

        return step

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        if add is not None:
            raise CannotEmit
        stream = program.buffer(self.d_model)
        prenorm = not isinstance(self.norm, nn.Identity)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            mark = program.mark()
            emit(block, program, x, out if i == last and not prenorm else stream, None)
            program.recycle(mark)
            x = stream
        if prenorm:
            emit_norm(program, stream, self.norm, out)

    @property
    def state_size(self) -> int | None:
        sizes = [cast(Block, block).state_size for block in self.blocks]
        return None if None in sizes else sum(cast(list[int], sizes))

    def check_state(self, state: State, batch_size: int) -> None:
        if not self.causal:
            raise ValueError("state: a bidirectional backbone takes none, it sees the whole sequence; expected None")
        if not isinstance(state, tuple) or len(state) != len(self.blocks):
            given = f"{len(state)} of them" if isinstance(state, tuple) else type(state).__name__
            raise TypeError(f"state: expected a tuple of {len(self.blocks)} block states or None, got {given}")
        for i, (block, part) in enumerate(zip(self.blocks, state, strict=True)):
            try:
                cast(Block, block).check_state(part, batch_size)
            except (TypeError, ValueError) as error:
                raise type(error)(f"state[{i}]: {error}") from None


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
    unknown = [name for name in pattern if name not in layers.LAYERS]
    if unknown:
        raise ValueError(f"mixer: no layer is called {unknown[0]!r}, expected one of {', '.join(layers.available())}")
    return list(islice(cycle(pattern), n_layers))
