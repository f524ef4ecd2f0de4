"""What a run keeps in its folder, written whole, and checked before it is resumed."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from safetensors.torch import save

from lra.differences import plan_differences
from lra.files import write_whole
from lra.objectives import Net

# In a cell's folder: the weights that are kept, the state a run resumes from, the curve.
BEST, LAST, METRICS = "best.safetensors", "last.ckpt", "metrics.csv"


class WholeFile(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all.

    Only the first process writes. Were it to raise at once, the others would wait for it: the error is kept for
    `check`.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # in memory, since its errors do not say that a disk is full
        try:
            write_whole(Path(path), lambda p: p.write_bytes(buffer.getbuffer()))
        except OSError as error:
            self.error = error

    def check(self) -> None:
        """Raises OSError if the last checkpoint could not be written."""
        if self.error is not None:
            raise self.error


def write_weights(folder: Path, row: dict[str, float], net: Net) -> None:
    """Writes the weights of a row of the curve beside those that are kept, which stay until `keep_weights`."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    new = _pending(folder, row)
    write_whole(new, lambda path: path.write_bytes(save(weights)))
    _remove_pending(folder, but=new)  # surpassed before any checkpoint named them


def keep_weights(folder: Path, best: dict[str, float]) -> None:
    """Makes `best.safetensors` hold the weights of the best row of the checkpoint on disk.

    Called after a checkpoint is written and before one is resumed: a run that dies in between, and then takes another
    course, must not keep weights of steps that it went back behind.
    """
    if best and (new := _pending(folder, best)).exists():
        new.replace(folder / BEST)
    _remove_pending(folder)


def _remove_pending(folder: Path, but: Path | None = None) -> None:
    for left in folder.glob(f"{BEST}.*"):
        if left != but:
            left.unlink()


def _pending(folder: Path, row: dict[str, float]) -> Path:
    return folder / f"{BEST}.{row['step']}"


def notes(plan: dict[str, Any], fingerprint: str | None, processes: int, device: str) -> dict[str, Any]:
    """What a checkpoint says of its run: what it must share with one that resumes it, and what it should."""
    made = {"threads": torch.get_num_threads(), "processes": processes, "device": device}
    return {"plan": {**plan, "data fingerprint": fingerprint}, "made": made}


def check_resumable(path: Path, ours: dict[str, Any]) -> None:
    """Refuses a checkpoint that is damaged or of another configuration or other data, naming what differs.

    It warns of other numbers of threads or processes and another kind of device: the first and the last change the last
    bits, the second also the units that are dropped.

    Args:
        ours: the `notes` of the run that is to resume.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs, made = checkpoint["plan"], checkpoint["made"]
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it to start this run again") from error
    if differences := plan_differences(theirs, ours["plan"]):
        raise ValueError(
            f"{path} is a checkpoint of another run ({'; '.join(differences)}); move it away to start this run again"
        )
    if differences := plan_differences(made, ours["made"]):
        warnings.warn(
            f"{path} was written on another set-up ({'; '.join(differences)}): the result may differ from that of an "
            f"uninterrupted run",
            stacklevel=2,
        )
