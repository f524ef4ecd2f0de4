"""A stack of mixers and feed-forward networks with residual connections."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from linrnn import layers
from linrnn.layers.base import RecurrentLayer, State, StepFn, blank_padding, finite, positive_int
from linrnn.layers.frozen import CannotEmit, compiled_step, emit
from linrnn.layers.frozen import norm as emit_norm
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

    def frozen_step(self) -> StepFn:
        self.require_causal("frozen_step")
        whole = compiled_step(self, self.d_model, self.init_state)
        if whole is not None:
            return whole
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


class BlockState(NamedTuple):
    """The states of a block whose feed-forward network has one too."""

    mixer: State
    ffn: State


class Block(nn.Module):
    """One mixer and one feed-forward network, or none, each with its norm and residual connection."""

    def __init__(
        self,
        mixer: RecurrentLayer,
        ffn: nn.Module | None,
        *,
        norm: str,
        norm_eps: float | None,
        prenorm: bool,
        dropout: float,
    ):
        super().__init__()
        self.prenorm = prenorm
        self.mixer = mixer
        self.ffn = ffn
        self.mixer_norm = build_norm(norm, mixer.d_model, norm_eps)
        self.ffn_norm = None if ffn is None else build_norm(norm, mixer.d_model, norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) to y (B, T, D) and the final state: the mixer's, or `BlockState`."""
        before, ffn_before = state if isinstance(state, BlockState) else (state, None)
        y, after = self.mixer(self.mixer_input(x), before, reset=reset, mask=mask)
        if not isinstance(self.ffn, RecurrentLayer):
            return self.finish(x, y), after
        x = self.add_mixed(x, y)
        y, ffn_after = self.ffn(self.ffn_input(x), ffn_before, reset=reset, mask=mask)
        return self.add_fed(x, y), BlockState(after, ffn_after)

    def frozen_step(self) -> StepFn:
        """Returns the step of `RecurrentLayer.frozen_step` for the whole block."""
        mixer_layer = cast(RecurrentLayer, self.mixer)
        whole = compiled_step(self, mixer_layer.d_model, self.init_state)
        if whole is not None:
            return whole
        mixer = cast(RecurrentLayer, self.mixer).frozen_step()
        if not isinstance(self.ffn, RecurrentLayer):

            def step(x: Tensor, state: State) -> tuple[Tensor, State]:
                y, state = mixer(self.mixer_input(x), state)
                return self.finish(x, y), state

            return step
        ffn = self.ffn.frozen_step()

        def step_both(x: Tensor, state: State) -> tuple[Tensor, State]:
            y, after = mixer(self.mixer_input(x), state.mixer)
            x = self.add_mixed(x, y)
            y, ffn_after = ffn(self.ffn_input(x), state.ffn)
            return self.add_fed(x, y), BlockState(after, ffn_after)

        return step_both

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        if add is not None or (self.training and self.dropout.p):
            raise CannotEmit
        for part, part_norm in ((self.mixer, self.mixer_norm), (self.ffn, self.ffn_norm)):
            if part is None:
                continue
            if self.prenorm:
                emit(part, program, emit_norm(program, x, part_norm), out, x)
            else:
                mixed = program.buffer(out.width)
                emit(part, program, x, mixed, x)
                emit_norm(program, mixed, part_norm, out)
            x = out

    def init_state(self, batch_size: int) -> State:
        """Returns the state before the first token."""
        mixer = cast(RecurrentLayer, self.mixer).init_state(batch_size)
        return BlockState(mixer, self.ffn.init_state(batch_size)) if isinstance(self.ffn, RecurrentLayer) else mixer

    def check_state(self, state: State, batch_size: int) -> None:
        """Raises TypeError or ValueError unless `state` is one of this block, for this batch."""
        mixer = cast(RecurrentLayer, self.mixer)
        if not isinstance(self.ffn, RecurrentLayer):
            return mixer.check_state(state, batch_size)
        if not isinstance(state, BlockState):
            raise TypeError(f"state: expected BlockState, got {type(state).__name__}")
        mixer.check_state(state.mixer, batch_size)
        self.ffn.check_state(state.ffn, batch_size)

    @property
    def state_size(self) -> int | None:
        """Numbers in the state of one sequence; None if it grows with T."""
        sizes = [part.state_size for part in (self.mixer, self.ffn) if isinstance(part, RecurrentLayer)]
        return None if None in sizes else sum(cast(list[int], sizes))

    def mixer_input(self, x: Tensor) -> Tensor:
        """Maps the block's input to the mixer's."""
        return self.mixer_norm(x) if self.prenorm else x

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Maps the block's input x and the mixer's output y to the block's output: token by token from here on."""
        x = self.add_mixed(x, y)
        return x if self.ffn is None else self.add_fed(x, self.ffn(self.ffn_input(x)))

    def add_mixed(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the mixer's output y to the block's input x."""
        x = x + self.dropout(y)
        return x if self.prenorm else self.mixer_norm(x)

    def ffn_input(self, x: Tensor) -> Tensor:
        """Maps what `add_mixed` returned to the feed-forward network's input."""
        return x if self.ffn_norm is None or not self.prenorm else self.ffn_norm(x)

    def add_fed(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the feed-forward network's output y to what `add_mixed` returned."""
        x = x + self.dropout(y)
        return x if self.ffn_norm is None or self.prenorm else self.ffn_norm(x)


def build_norm(norm: str, d_model: int, eps: float | None = None) -> nn.Module:
    """Returns the normalisation called "rms" or "layer", with its own eps (1e-6 and 1e-5) if None is given."""
    if eps is not None and not (finite(eps) and eps > 0):
        raise ValueError(f"norm_eps: expected a finite number > 0 or None, got {eps!r}")
    if norm == "rms":
        return nn.RMSNorm(d_model, eps=1e-6 if eps is None else eps)
    if norm == "layer":
        return nn.LayerNorm(d_model, eps=1e-5 if eps is None else eps)
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
