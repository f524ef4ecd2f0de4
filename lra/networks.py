"""Networks from their configuration, their size, and the transfer of a pretrained body."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from linrnn.layers import available
from linrnn.models import SequenceClassifier, count_params
from lra.config import Model, Objective, pooling
from lra.differences import tensor_differences
from lra.objectives import Net
from lra.tasks.base import Ids, Task

TOLERANCE = 0.1  # of the parameters of models that are compared
READS = "body.embed.weight"  # of the map that reads levels, (d_model, channels)


def build_body(model: Model, task: Task, *, mask_channel: bool = False) -> SequenceClassifier:
    """The classifier of a task.

    Args:
        mask_channel: of a task on levels, read one channel more, which marks hidden positions.

    Raises:
        ValueError: unknown mixer or mixer option, or a width that does not fit it.
    """
    check_mixer(model)
    body = SequenceClassifier(
        task.n_classes,
        vocab_size=task.inputs.vocab_size if isinstance(task.inputs, Ids) else None,
        d_input=None if isinstance(task.inputs, Ids) else task.inputs.channels + mask_channel,
        two_inputs=task.two_inputs,
        mixer=model.mixer,
        d_model=model.d_model,
        n_layers=model.n_layers,
        pooling=pooling(model, task),
        bidirectional=model.bidirectional,
        dropout=model.dropout,
        mixer_kwargs=model.kwargs,
        ffn_expand=model.ffn_expand,
        norm=model.norm,
        prenorm=model.prenorm,
        max_length=task.max_length,
    )
    if body.backbone.causal == model.bidirectional:
        raise ValueError(
            f"model.bidirectional is {model.bidirectional}, but {model.mixer} with {model.kwargs or 'its defaults'} "
            f"sees {'the past alone' if body.backbone.causal else 'both sides'}: the two kinds have tables of their own"
        )
    return body


def check_mixer(model: Model) -> None:
    if model.mixer not in available():
        raise ValueError(f"unknown model.mixer {model.mixer!r}; allowed: {', '.join(available())}")


def build_net(model: Model, task: Task, *, denoise: Objective | None = None, seed: int) -> Net:
    """A freshly initialised network, a function of all arguments; `denoise` adds the pretraining head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = build_body(model, task, mask_channel=denoise == "masked" and not isinstance(task.inputs, Ids))
        return Net(body, task.inputs, model.d_model, denoise=denoise is not None, ink=task.ink)


def sizes(model: Model, task: Task) -> dict[str, int]:
    """Parameters of the classifier: all, and those of the blocks (without embedding, final norm and head)."""
    with torch.device("meta"):
        body = build_body(model, task)
    blocks = sum(count_params(block) for block in body.backbone.blocks)
    return {"total": count_params(body), "blocks": blocks}


def matched(model: Model, task: Task, target: int) -> Model:
    """`model` at the width whose total parameter count is nearest to `target`: a multiple of 8, or of 4 if none fits.

    Raises:
        ValueError: no width comes within 10 %.
    """
    check_mixer(model)
    first = next((w for w in range(model.d_model, 2 * model.d_model + 32) if total(model, task, w)), None)
    if first is None:
        total(model, task, model.d_model, refuse=True)
    assert first is not None
    # Parameters grow between linearly and quadratically with the width.
    ratio = target / total(model, task, first)
    low, high = sorted((first * ratio, first * ratio**0.5))
    for step in (8, 4):
        near = range(max(step, (int(low) // step - 2) * step), int(high) + 3 * step, step)
        counts = {width: n for width in near if (n := total(model, task, width))}
        if counts:
            best = min(counts, key=lambda width: abs(counts[width] - target))
            if abs(counts[best] - target) <= TOLERANCE * target:
                return replace(model, d_model=best)
    raise ValueError(
        f"no width of {model.mixer} has {target:,} parameters within {TOLERANCE:.0%}; tried: "
        + (", ".join(f"{width} ({n:,})" for width, n in counts.items()) or "none that it takes")
    )


def total(model: Model, task: Task, width: int, *, refuse: bool = False) -> int:
    """Parameters of the classifier at a width, from those of one block; 0 if the mixer does not take it.

    Raises:
        ValueError: with `refuse`, instead of 0.
    """
    try:
        with torch.device("meta"):
            body = build_body(replace(model, d_model=width, n_layers=1), task)
    except ValueError:  # such as a width that the number of heads does not divide
        if refuse:
            raise
        return 0
    return count_params(body) + (model.n_layers - 1) * count_params(body.backbone.blocks[0])


def head_free(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that pretraining and fine-tuning share: the body without the classifier's head."""
    return {name: tensor for name, tensor in state.items() if name.startswith("body.") and not is_head(name)}


def is_head(name: str) -> bool:
    return name.startswith("body.head.")


def load_weights(net: Net, path: Path, *, heads: bool) -> None:
    """Loads `best.safetensors` into `net`, strictly; without `heads` the body alone, and the heads stay fresh.

    The weights of the channel that marked hidden positions in pretraining are left out with the heads.

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
        if READS in theirs and not isinstance(net.inputs, Ids) and not net.mask_channel:
            theirs[READS] = theirs[READS][:, : net.inputs.channels].contiguous()
    if differences := tensor_differences(theirs, ours):
        shown = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        raise ValueError(f"{path} is a checkpoint of another model: {shown}; move its folder away to compute it again")
    net.load_state_dict(theirs, strict=heads)
