"""A block of a backbone: a mixer, a feed-forward network, their norms and residual connections."""

from typing import NamedTuple, cast

from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StepFn, finite
from linrnn.layers.frozen import CannotEmit, compiled_step, emit, plain, stands_for_call, written_for
from linrnn.layers.frozen import norm as emit_norm
from linrnn.ops.step_program import Ref, StepProgram


class BlockState(NamedTuple):
    """The states of a block whose feed-forward network has one too."""

    mixer: State
    ffn: State


class Block(nn.Module):
    """One mixer and one feed-forward network, or none, each with its norm and residual connection."""

    mixer: RecurrentLayer
    ffn: nn.Module | None

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

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Maps one token x_t (B, D) and a state to y_t (B, D) and the next state: forward at length 1."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def frozen_step(self) -> StepFn:
        """Returns the step of `RecurrentLayer.frozen_step` for the whole block."""
        whole = compiled_step(self, self.mixer.d_model, self.init_state)
        if whole is not None:
            return whole
        if not stands_for_call(self, "frozen_step"):
            return self.step
        mixer = self.mixer.frozen_step()
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
        written_for(self, "emit_step", "mixer_input", "finish", "add_mixed", "ffn_input", "add_fed")
        plain(nn.Dropout, self.dropout)
        if add is not None or (self.dropout.training and self.dropout.p):
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
        mixer = self.mixer.init_state(batch_size)
        return BlockState(mixer, self.ffn.init_state(batch_size)) if isinstance(self.ffn, RecurrentLayer) else mixer

    def check_state(self, state: State, batch_size: int) -> None:
        """Raises TypeError or ValueError unless `state` is one of this block, for this batch."""
        if not isinstance(self.ffn, RecurrentLayer):
            return self.mixer.check_state(state, batch_size)
        if not isinstance(state, BlockState):
            raise TypeError(f"state: expected BlockState, got {type(state).__name__}")
        self.mixer.check_state(state.mixer, batch_size)
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
