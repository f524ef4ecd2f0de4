"""Language models: embed, mix, predict the next token."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linrnn.layers.base import State, StepFn, describe, finite, positive_int
from linrnn.layers.frozen import compiled_step, emit, linear, stands_for_call
from linrnn.models.backbone import SequenceBackbone
from linrnn.models.block import build_norm
from linrnn.models.pretrained import Pretrained
from linrnn.models.tokens import check_ids, embed_ids
from linrnn.ops.step_program import Ref, StepProgram


class LanguageModel(Pretrained):
    """Maps token ids (B, T) and a state to the logits (B, T, vocab_size) of each next token and the state behind them.

    ```python
    logits, state = model(ids, state=None, reset=None, mask=None)
    logits_t, state = model.step(ids_t, state)  # ids_t: (B,), logits_t: (B, vocab_size)
    ```

    State, reset and mask are those of a layer: `SequenceBackbone` keeps the same contract, and its last norm is the
    final norm here. A new model's loss is about log(vocab_size): a tied head, whose logits would favour the token just
    read by far, starts behind a final norm whose gain is 1 / sqrt(d_model).

    Args:
        vocab_size: number V of token ids.
        mixer, d_model, n_layers, mixer_kwargs, ffn, ffn_expand, ffn_kwargs, norm, norm_eps, prenorm, dropout: the
            backbone's.
        tie_embeddings: the head's weight is the embedding's (Press and Wolf 2017, arXiv:1608.05859).
        embed_scale: factor of the embeddings (sqrt(d_model) in Gemma), none if None.
        embed_norm: normalises the embeddings, as RWKV does.
        logit_soft_cap: c of c tanh(logits / c), which keeps logits within ±c (Gemma); none if None.
    """

    tokenizer: Any = None  # what `load_pretrained` found beside the weights

    def __init__(
        self,
        vocab_size: int,
        *,
        mixer: str | Sequence[str] = "lru",
        d_model: int = 64,
        n_layers: int = 2,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
        mixer_kwargs: Mapping[str, Any] | None = None,
        ffn: str | None = "swiglu",
        ffn_expand: float = 2.0,
        ffn_kwargs: Mapping[str, Any] | None = None,
        norm: str = "rms",
        norm_eps: float | None = None,
        prenorm: bool = True,
        embed_scale: float | None = None,
        embed_norm: bool = False,
        logit_soft_cap: float | None = None,
    ):
        super().__init__()
        self.config = self.constructor_arguments(locals())
        self.vocab_size, self.tie_embeddings = positive_int("vocab_size", vocab_size), tie_embeddings
        for name, value in (("embed_scale", embed_scale), ("logit_soft_cap", logit_soft_cap)):
            if value is not None and not (finite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number > 0 or None, got {value!r}")
        self.embed_scale, self.logit_soft_cap = embed_scale, logit_soft_cap
        self.backbone = SequenceBackbone(
            mixer,
            d_model,
            n_layers,
            mixer_kwargs=mixer_kwargs,
            ffn=ffn,
            ffn_expand=ffn_expand,
            ffn_kwargs=ffn_kwargs,
            norm=norm,
            norm_eps=norm_eps,
            prenorm=prenorm,
            dropout=dropout,
        )
        if not self.backbone.causal:
            raise ValueError(f"mixer_kwargs: a language model looks back only; expected causal mixers, got {mixer!r}")
        self.embed = nn.Embedding(vocab_size, d_model)
        self.embed_norm = build_norm(norm, d_model, norm_eps) if embed_norm else None
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a new embedding and head; the layers below have drawn theirs."""
        d_model = self.backbone.d_model
        nn.init.normal_(self.embed.weight, std=d_model**-0.5 if self.tie_embeddings else 1.0)
        if self.tie_embeddings:
            norms = [module for module in self.backbone.modules() if isinstance(module, (nn.RMSNorm, nn.LayerNorm))]
            nn.init.constant_(norms[-1].weight, d_model**-0.5)
        else:
            nn.init.normal_(self.head.weight, std=d_model**-0.5)

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes config.json, the weights and the tokenizer, if there is one; see `Pretrained.save_pretrained`.

        `load_pretrained` gives the tokenizer back, `from_pretrained` the model alone.
        """
        super().save_pretrained(folder, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def forward(
        self, ids: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps ids (B, T) integer and a state to logits (B, T, V) and the state after the last token.

        Raises:
            TypeError: ids is no tensor, or the state none of this model's.
            ValueError: a wrong shape or dtype, or an id outside the vocabulary.
        """
        h, state = self.features(ids, state, reset=reset, mask=mask)
        return self.read_out(h), state

    def features(
        self, ids: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps ids (B, T) and a state to what the head reads (B, T, D) and the state: a prefill needs no logits."""
        check_ids("ids", ids)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape):
            raise ValueError(f"mask: expected a bool tensor of shape {tuple(ids.shape)}, got {describe(mask)}")
        return self.backbone(self.embed_tokens(ids, mask), state, reset=reset, mask=mask)

    def embed_tokens(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps ids (B, T) to what the backbone reads, (B, T, D)."""
        return self.prepare(embed_ids("ids", ids, self.embed, mask))

    def prepare(self, e: Tensor) -> Tensor:
        """Maps embeddings (..., D) to what the backbone reads: scaled and normalised, if the model does that."""
        if self.embed_scale is not None:
            e = e * self.embed_scale
        return e if self.embed_norm is None else self.embed_norm(e)

    def read_out(self, h: Tensor) -> Tensor:
        """Maps features (..., D) to logits (..., V)."""
        return self.capped(self.head(h))

    def capped(self, logits: Tensor) -> Tensor:
        """Bounds logits by the soft cap, if the model has one."""
        c = self.logit_soft_cap
        return logits if c is None else c * torch.tanh(logits / c)

    def step(self, ids_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Maps one token ids_t (B,) and a state to logits (B, V) and the next state: forward at length 1."""
        if not isinstance(ids_t, Tensor) or ids_t.ndim != 1:
            raise ValueError(f"ids_t: expected a tensor of shape (batch,), got {describe(ids_t)}")
        logits, state = self(ids_t[:, None], state)
        return logits[:, 0], state

    def frozen_step(self) -> StepFn:
        """Returns a function that does what `step` does, for inference at speed; see `RecurrentLayer.frozen_step`."""
        if not stands_for_call(self, "emit_step", "features", "embed_tokens", "read_out"):
            return self.step
        whole = compiled_step(self, self.backbone.d_model, self.init_state, self.vocab_size)
        if whole is not None:

            def step_at_once(ids_t: Tensor, state: State) -> tuple[Tensor, State]:
                with torch.no_grad():
                    logits, state = whole(self.prepare(self.embed(ids_t)), state)
                    return self.capped(logits), state

            return step_at_once
        backbone = self.backbone.frozen_step()
        head = compiled_step(self.head, self.backbone.d_model, lambda _: (), self.vocab_size)

        def step(ids_t: Tensor, state: State) -> tuple[Tensor, State]:
            h, state = backbone(self.prepare(self.embed(ids_t)), state)
            logits = self.head(h) if head is None else head(h, ())[0]
            return self.capped(logits), state

        return step

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes what is between embeddings and logits into a program; see `linrnn.layers.frozen`."""
        features = program.buffer(self.backbone.d_model)
        emit(self.backbone, program, x, features, add)
        linear(program, features, self.head, out=out)

    def generate(
        self, ids: Tensor | Sequence[Tensor | Sequence[int]], max_new_tokens: int, **options: Any
    ) -> Tensor | Iterator[Tensor]:
        """Continues prompts ids (B, T), or a list of any lengths: `linrnn.decode.generate`, with all its options."""
        from linrnn.decode.generation import generate  # decode imports models

        return generate(self, ids, max_new_tokens, **options)

    def init_state(self, batch_size: int) -> State:
        """Returns the state before the first token, on the device and in the precision of the model."""
        return self.backbone.init_state(batch_size)

    def check_state(self, state: State, batch_size: int) -> None:
        """Raises TypeError or ValueError unless `state` is one of this model, for this batch."""
        self.backbone.check_state(state, batch_size)

    @property
    def state_size(self) -> int | None:
        """Numbers in the state of one sequence; None if it grows with T."""
        return self.backbone.state_size
