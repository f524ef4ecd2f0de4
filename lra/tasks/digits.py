"""Digits: 8 x 8 images that come with scikit-learn, a task on real data that needs no download and takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lra.tasks.images import DIGITS, Images

if TYPE_CHECKING:
    import numpy as np

N_TRAIN_VAL = 1_497


@dataclass(frozen=True, kw_only=True)
class Digits(Images):
    """The 1,797 handwritten digits of scikit-learn (Alpaydin and Kaynak 1998, UCI), 64 pixels of levels 0 to 16.

    The last 300 rows of the table are the test split; 297 of the first 1,497 are for validation, drawn by the seed.
    `index` counts from 0 in the training rows and again in the test rows.
    """

    name: ClassVar[str] = "digits"
    summary: ClassVar[str] = "8 x 8 handwritten digits of scikit-learn: real data without a download"
    ink: ClassVar[bool] = True
    shape: ClassVar[tuple[int, int, int]] = (8, 8, 1)
    classes: ClassVar[tuple[str, ...]] = DIGITS
    n_source: ClassVar[dict[str, int]] = {"train": N_TRAIN_VAL, "test": 300}
    n_levels: ClassVar[int] = 17
    mean: ClassVar[float] = 4.88
    std: ClassVar[float] = 6.0

    def held_out(self, n: int) -> int:
        return 297

    def read(self, workers: int | None, data_dir: Path | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns the table, cut in two.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"task {self.name!r} is a table of scikit-learn, which is not installed: pip install 'linrnn[lra]'"
            ) from error
        levels, labels = load_digits(return_X_y=True)
        levels = levels.astype("uint8")
        cut = N_TRAIN_VAL
        return {"train": (levels[:cut], labels[:cut]), "test": (levels[cut:], labels[cut:])}

    def source(self, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
        return {"package": "scikit-learn", "table": "load_digits"}
