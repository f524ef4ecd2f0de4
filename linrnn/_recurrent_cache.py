"""The state of a language model where transformers expects a cache of keys and values."""

import copy
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from linrnn.decode import state as state_ops
from linrnn.layers.base import State, StepFn
from linrnn.models.language import LanguageModel
from linrnn.models.tokens import check_vocabulary


class FrozenStep:
    """The frozen step of a model, and what it was made of: the model and its weights, by place and version.

    Everything that torch counts as a write is noticed; what a fused optimizer writes is not.
    """

    def __init__(self, model: LanguageModel):
        self.model = ref(model)
        self.places = [
            (place, name, tensor, tensor.data_ptr(), tensor.is_inference() or tensor._version)
            for module in model.modules()
            for place in (module._parameters, module._buffers)
            for name, tensor in place.items()
            if tensor is not None
        ]
        self.call: StepFn = model.frozen_step()

    def of(self, model: LanguageModel) -> bool:
        """Returns whether this is the step of the model as it is now."""
        if self.model() is not model:
            return False
        for place, name, tensor, address, version in self.places:
            # `is True`: torch counts no writes to what was made in inference mode
            if place[name] is not tensor or tensor.data_ptr() != address:
                return False
            if version is not True and tensor._version != version:
                return False
        return True


class RecurrentCache:
    """The state behind the tokens seen so far, where transformers expects `past_key_values`.

    A model replaces `state` and never writes into it, so `copy.copy(cache)` is a snapshot: a prompt read once serves
    any number of continuations. Steps use weights as they were packed at the first one, and pack them again when they
    have changed; after steps of a fused optimizer, which torch does not count as writes, call `reset`.

    Args:
        state: what `LanguageModel` returned; None is the state before the first token.
        seen: number of tokens, padding included, that led to it.
    """

    is_compileable = False
    is_croppable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, state: State = None, seen: int = 0):
        self.state, self.seen = state, seen
        self.frozen: FrozenStep | None = None
        self.made: tuple[State, int] = (None, 0)  # the last state that a step returned, and its batch size

    def step(self, model: LanguageModel, ids_t: Tensor) -> Tensor:
        """Reads one token ids_t (B,) of each sequence and returns the model's logits (B, V).

        Raises:
            TypeError, ValueError: the state is none of the model's, or of another batch size.
            ValueError: an id outside the vocabulary.
        """
        B = len(ids_t)
        check_vocabulary("input_ids", ids_t, model.vocab_size)
        if self.frozen is None or not self.frozen.of(model):
            self.frozen, self.made = FrozenStep(model), (None, 0)
        if self.made[0] is not self.state or self.made[1] != B:
            model.backbone.check_state(self.state, B)
        logits, self.state = self.frozen.call(ids_t, self.state)
        self.made = self.state, B
        return logits

    def __copy__(self) -> "RecurrentCache":
        other = type(self)(self.state, self.seen)
        other.frozen, other.made = self.frozen, self.made
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecurrentCache":
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state, "seen": self.seen}

    def __setstate__(self, values: dict[str, Any]) -> None:
        RecurrentCache.__init__(self, values["state"], values["seen"])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Counts the tokens read, the same for every layer."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: no number of tokens is too many."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Returns whether tokens have been read."""
        return self.state is not None

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """Number of sequences, 0 before the first token."""
        return next((leaf.shape[0] for leaf in state_ops.leaves(self.state)), 0)

    def reset(self) -> None:
        """Goes back to before the first token, and forgets the weights."""
        RecurrentCache.__init__(self)

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Continues from these sequences of the batch: the beams that survive."""
        self.state = state_ops.select(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence, the copies side by side."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises NotImplementedError unless there is nothing to remove: a recurrent state cannot be run backwards."""
        if tokens_to_remove:
            raise NotImplementedError(
                f"crop: a recurrent state cannot forget its last tokens, asked for {tokens_to_remove}; keep a copy of "
                "the cache (copy.copy) from before them, and for assisted generation use linrnn.decode.speculative"
            )
