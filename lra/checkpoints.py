"""What a run keeps in its folder, written whole, and checked before it is resumed."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lra.differences import plan_differences
from lra.files import write_whole

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


def check_resumable(path: Path, plan: dict[str, Any]) -> None:
    """Refuses a checkpoint that is damaged or of another configuration, naming what differs."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs, threads = checkpoint["plan"], checkpoint["threads"]
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it to start this run again") from error
    if differences := plan_differences(theirs, plan):
        raise ValueError(
            f"{path} is a checkpoint of another run ({'; '.join(differences)}); move it away to start this run again"
        )
    if threads != torch.get_num_threads():
        warnings.warn(
            f"{path} was written with {threads} threads and is resumed with {torch.get_num_threads()}: "
            f"the last bits of the result may differ",
            stacklevel=2,
        )
