"""A `LanguageModel` as a transformers model: `generate`, beam search, pipelines, the Trainer and the Auto classes.

```python
from linrnn.hf import LinRNNForCausalLM  # registers itself with AutoConfig and AutoModelForCausalLM

hf = LinRNNForCausalLM.from_linrnn(model)  # shares the parameters; hf.model is the model
hf.generate(ids, max_new_tokens=20, num_beams=4)
```

Needs `pip install 'linrnn[hf]'` (transformers 5.20 or newer).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from linrnn._recurrent_cache import RecurrentCache
from linrnn.layers.base import describe
from linrnn.models import LanguageModel
from linrnn.models.config import plain
from linrnn.models.migrations import FORMAT

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        f"linrnn.hf needs transformers 5.20 or newer; install it with: pip install 'linrnn[hf]' ({error})"
    ) from error


__all__ = ["LinRNNConfig", "LinRNNForCausalLM", "RecurrentCache"]


class LinRNNConfig(PreTrainedConfig):
    """Configuration of `LinRNNForCausalLM`.

    Args:
        arguments: keyword arguments of `LanguageModel`. From them follow vocab_size, hidden_size, num_hidden_layers and
            tie_word_embeddings, which are there to be read.
        format: format of the checkpoint, `linrnn.models.migrations.FORMAT`.
        use_cache: whether the model returns its state where a call does not say.
    """

    model_type = "linrnn"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    arguments: dict | None = None
    format: int = FORMAT
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # a folder that LanguageModel.save_pretrained wrote is read too
        name = kwargs.pop("class", "LanguageModel")
        if name != "LanguageModel":
            raise ValueError(f"class: expected LanguageModel, got {name}; load it with linrnn.models.{name}")
        if self.format != FORMAT:
            raise ValueError(
                f"format: expected {FORMAT}, got {self.format}; "
                + (
                    "update linrnn"
                    if self.format > FORMAT
                    else "load it with LanguageModel.from_pretrained, then LinRNNForCausalLM.from_linrnn"
                )
            )
        for follows in ("version", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
            kwargs.pop(follows, None)
        if self.arguments is not None:
            try:
                self.arguments = plain(vars(LanguageModel.Config(**self.arguments)))
            except TypeError as error:
                raise ValueError(f"arguments: expected keyword arguments of LanguageModel ({error})") from error
            setattr(self, "class", name)  # with which LanguageModel.from_pretrained reads the folder
            self.vocab_size = self.arguments["vocab_size"]
            self.hidden_size = self.arguments["d_model"]
            self.num_hidden_layers = self.arguments["n_layers"]
            self.tie_word_embeddings = self.arguments["tie_embeddings"]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; the contents of a config.json without a format are of the first one."""
        return super().from_dict({"format": 1, **config_dict}, **kwargs)


class LinRNNForCausalLM(PreTrainedModel, GenerationMixin):
    """Maps input_ids (B, T) and attention_mask (B, T) to logits (B, T, V), with a loss where labels are given.

    Padding, left or right, leaves the state unchanged; `generate` goes on from the last column, so prompts are padded
    left. `past_key_values` is a `RecurrentCache`. The wrapped `LanguageModel` is `model`. Hidden states, attention
    weights and gradient checkpointing are not to be had.
    """

    config_class = LinRNNConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _is_stateful = True  # transformers then refuses what has to take tokens back: assisted generation
    _tied_weights_keys: ClassVar = {  # type: ignore[misc]
        "model.head.weight": "model.embed.weight"
    }

    def __init__(self, config: LinRNNConfig):
        super().__init__(config)
        if config.arguments is None:
            raise ValueError("config.arguments: expected keyword arguments of LanguageModel, got None")
        self.model = LanguageModel(**config.arguments)
        self.post_init()

    @classmethod
    def from_linrnn(cls, model: LanguageModel, **config: Any) -> Self:
        """Wraps a model, which it shares; `config` are further fields of the configuration, like eos_token_id.

        Raises:
            TypeError: model is not a `LanguageModel`; one of a derived class could not be loaded as what it is.
            ValueError: a field that the model itself says.
        """
        if type(model) is not LanguageModel:
            raise TypeError(f"model: expected a LanguageModel, got {type(model).__name__}")
        for name in ("arguments", "dtype"):
            if name in config:
                raise ValueError(f"config: expected fields that the model does not say, got {name}")
        with torch.device("meta"):
            wrapper = cls(LinRNNConfig(arguments=vars(model.config), dtype=model.embed.weight.dtype, **config))
        wrapper.model = model
        return wrapper.train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but tensors that are missing or left over are an error, and pickles are not read.

        Raises:
            ValueError: names of tensors that do not fit; a damaged file; or a device_map of several devices.
        """
        kwargs.setdefault("use_safetensors", True)
        check_device_map(kwargs.get("device_map"))
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{args[0]}: damaged or not a safetensors file ({error})") from error
        model, info = loaded
        check_device_map(getattr(model, "hf_device_map", None))
        problems = [f"{kind}: {name}" for kind in ("missing", "unexpected") for name in sorted(info[f"{kind}_keys"])]
        if problems:
            raise ValueError(
                f"{args[0] if args else 'state_dict'}: does not fit {cls.__name__} ({'; '.join(problems)})"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` its cache where it would have made one of keys and values, or none."""
        kind = generation_config.cache_implementation
        if kind is not None:
            raise ValueError(f"cache_implementation: expected None, the cache is a RecurrentCache, got {kind!r}")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RecurrentCache()
        else:
            cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: the layers have drawn their parameters when they were built."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the wrapped model and its configuration follow."""
        embed = super().resize_token_embeddings(*args, **kwargs)
        size = self.model.vocab_size = embed.num_embeddings
        self.model.config = dataclasses.replace(self.model.config, vocab_size=size)
        self.config.arguments = {**self.config.arguments, "vocab_size": size}
        return embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Maps input_ids (B, T) and the cache behind the tokens before them to logits of each next token.

        Args:
            attention_mask: (B, S), nonzero on real tokens; its last T columns are those of input_ids.
            past_key_values: the cache, which is brought up to the last token.
            labels: (B, T), -100 where none; the loss compares the label at t + 1 with the logits at t.
            use_cache: whether to return a cache; None: as the configuration says, and not in training.
            logits_to_keep: compute the last so many logits alone (0: all), or those at these positions.
            kwargs: for the loss.

        Raises:
            TypeError: no ids, or a cache of another kind.
            ValueError: an attention mask of another shape, or a request for what is not to be had.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds: expected None, a LanguageModel reads token ids; pass input_ids")
        given = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        if any(self.asked(name, value, False) for name, value in given.items()):
            raise ValueError("output_hidden_states, output_attentions: expected False, the model does not return them")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
            raise TypeError(f"input_ids: expected a tensor of shape (batch, time), got {describe(input_ids)}")
        cache = past_key_values
        if cache is not None and not isinstance(cache, RecurrentCache):
            raise TypeError(f"past_key_values: expected a RecurrentCache or None, got {type(cache).__name__}")
        mask = token_mask(attention_mask, input_ids)
        if cache is None and self.asked("use_cache", use_cache, True) and not (self.training and use_cache is None):
            cache = RecurrentCache()
        state = None if cache is None else cache.state
        stepping = state is not None and mask is None and input_ids.shape[1] == 1
        if cache is not None and stepping and self.may_freeze(input_ids):
            logits = cache.step(self.model, input_ids[:, 0])[:, None]
        else:
            h, state = self.model.features(input_ids, state, mask=mask)
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.read_out(h[:, keep])
            if cache is not None:
                cache.state = state
        if cache is not None:
            cache.seen += input_ids.shape[1]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.model.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cast(Any, cache))
        return output if self.asked("return_dict", return_dict, True) else output.to_tuple()

    def asked(self, name: str, value: bool | None, default: bool) -> bool:
        """Returns an option of a call, or else of the configuration."""
        value = getattr(self.config, name, None) if value is None else value
        return default if value is None else value

    def may_freeze(self, ids: Tensor) -> bool:
        """Returns whether a step that computes with the parameters as they are now is right."""
        return not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type))


def check_device_map(device_map: Any) -> None:
    """Raises ValueError for more than one device: steps do not go through the modules that would move tensors."""
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(f"device_map: expected one device for the whole model, got {', '.join(sorted(devices))}")


def token_mask(attention_mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Maps an attention mask (B, S) to the mask (B, T) of the tokens being read; None where all are real."""
    if attention_mask is None:
        return None
    B, T = ids.shape
    shape: Sequence[int] = attention_mask.shape
    if len(shape) != 2 or shape[0] != B or shape[1] < T:
        raise ValueError(
            f"attention_mask: expected shape ({B}, at least {T}), one column for each token, got {tuple(shape)}"
        )
    mask = attention_mask[:, -T:].bool()
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


AutoConfig.register(LinRNNConfig.model_type, LinRNNConfig)
AutoModelForCausalLM.register(LinRNNConfig, LinRNNForCausalLM)
