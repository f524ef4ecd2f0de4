"""Networks from their configuration, their size, and the transfer of a pretrained body."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from linrnn.layers import available
from linrnn.models import SequenceClassifier, count_params, match_params
from linrnn.models.backbone import build_mixer
from lra.config import Model
from lra.differences import tensor_differences
from lra.objectives import Net


def build_body(model: Model, task: Any) -> SequenceClassifier:
    """The classifier of a task; `model.pooling: auto` is the task's, or `last` for a model that sees only the past.

    Raises:
        ValueError: unknown mixer or mixer option, or a width that does not fit it.
    """
    check_mixer(model)
    return SequenceClassifier(
        task.n_classes,
        vocab_size=task.vocab_size,
        mixer=model.mixer,
        d_model=model.d_model,
        n_layers=model.n_layers,
        pooling=pooling(model, task),
        bidirectional=model.bidirectional,
        dropout=model.dropout,
        mixer_kwargs=dict(model.mixer_kwargs),
        ffn_expand=model.ffn_expand,
        norm=model.norm,
        prenorm=model.prenorm,
        max_length=task.max_length,
    )


def check_mixer(model: Model) -> None:
    if model.mixer not in available():
        raise ValueError(f"unknown model.mixer {model.mixer!r}; allowed: {', '.join(available())}")


def pooling(model: Model, task: Any) -> str:
    if model.pooling != "auto":
        return model.pooling
    return task.pooling if model.bidirectional else "last"


def build_net(model: Model, task: Any, *, denoise: bool, seed: int) -> Net:
    """A freshly initialised network, a function of (model, task, seed); `denoise` adds the pretraining head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = build_body(model, task)
        return Net(body, model.d_model, task.vocab_size if denoise else None)


def sizes(model: Model, task: Any) -> dict[str, int]:
    """Parameters of the classifier: all, and those of the blocks (without embedding, final norm and head)."""
    with torch.device("meta"):
        body = build_body(model, task)
    blocks = sum(count_params(block) for block in body.backbone.blocks)
    return {"total": count_params(body), "blocks": blocks}


def matched(model: Model, task: Any, target: int) -> Model:
    """`model` at the width (a multiple of 8) whose total parameter count is nearest to `target`.

    Raises:
        ValueError: no width comes within 10 %.
    """

    check_mixer(model)

    def build(width: int) -> nn.Module:
        return build_body(replace(model, d_model=width), task)

    def takes(width: int) -> bool:
        try:
            with torch.device("meta"):
                build_mixer(model.mixer, width, model.mixer_kwargs, model.bidirectional)
        except ValueError:  # such as a width that the number of heads does not divide
            return False
        return True

    widths = [width for width in range(max(8, model.d_model // 32 * 8), 4 * model.d_model + 1, 8) if takes(width)]
    return replace(model, d_model=match_params(target, build, widths))


def head_free(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that pretraining and fine-tuning share: the body without the classifier's head."""
    return {name: tensor for name, tensor in state.items() if name.startswith("body.") and not is_head(name)}


def is_head(name: str) -> bool:
    return name.startswith("body.head.")


def load_weights(net: Net, path: Path, *, heads: bool) -> None:
    """Loads `best.safetensors` into `net`, strictly; without `heads` the body alone, and the heads stay fresh.

    Raises:
        ValueError: the file is damaged, or of another model: the differing tensors are named.
    """
    try:
        theirs = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete its folder and run again") from error
    ours = net.state_dict()
    if not heads:
        theirs, ours = head_free(theirs), head_free(ours)
    if differences := tensor_differences(theirs, ours):
        shown = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        raise ValueError(f"{path} is a checkpoint of another model: {shown}")
    net.load_state_dict(theirs, strict=heads)
