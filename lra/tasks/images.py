"""Images as sequences of pixels, without augmentation: the Image task of the Long Range Arena, sequential CIFAR-10 in
colour, sequential MNIST in raster order and permuted, and what further tasks on images share.

The validation split is a tenth of the source's training images, drawn by the seed; every row keeps its `index` in the
source and its `origin`, so that a split can be built again elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lra.tasks.base import SPLITS, Ids, Levels, Task, check_caps

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class Images(Task):
    """Base of the tasks on images of one size.

    The splits have the columns input_ids (uint8 levels, the channels of a pixel side by side), label, index (of the row
    in the source split) and origin (0: the source's training images, 1: its test images). Rows are in the shuffled
    order of the seed, and a cap takes the first of them, so that a smaller split is a part of the larger one.
    """

    mask_rate: float = 0.5
    """Share of pixels hidden in masked pretraining (Amos et al. 2024, arXiv:2310.02980)."""
    encoding: Literal["pixels", "tokens"] = "pixels"
    """pixels: real values (level - mean) / std through a linear map; tokens: levels through an embedding."""
    pretrain_loss: Literal["l1", "ce"] = "l1"
    """Denoising loss of pixels: absolute error, or cross-entropy over the levels (which is that of tokens)."""
    n_train: int | None = None
    """Training images; null for all."""
    n_val: int | None = None
    """Validation images; null for all."""
    n_test: int | None = None
    """Test images; null for all."""

    not_data: ClassVar[tuple[str, ...]] = (*Task.not_data, "encoding", "pretrain_loss")
    folders: ClassVar[tuple[str, ...]] = ()  # names of the source's files in a user's folder
    columns: ClassVar[dict[str, str]]  # of the source: the image, the label
    shape: ClassVar[tuple[int, int, int]]  # height, width, channels
    classes: ClassVar[tuple[str, ...]]
    n_source: ClassVar[dict[str, int]]  # images in the source
    n_levels: ClassVar[int] = 256
    mean: ClassVar[float]  # of the training images' levels
    std: ClassVar[float]

    def check(self) -> None:
        check_caps(self, self._available(self.n_source))

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def max_length(self) -> int:
        height, width, channels = self.shape
        return height * width * (channels if self.encoding == "tokens" else 1)

    @property
    def inputs(self) -> Ids | Levels:
        if self.encoding == "tokens":
            return Ids(self.n_levels + 2, pad_id=self.n_levels, mask_id=self.n_levels + 1)
        return Levels(self.shape[2], self.mean, self.std, self.pretrain_loss)

    @property
    def rows(self) -> dict[str, int]:
        available = self._available(self.n_source)
        return {split: getattr(self, f"n_{split}") or most for split, most in available.items()}

    def held_out(self, n: int) -> int:
        """Returns how many of `n` training images of the source are for validation."""
        return n // 10

    def _available(self, n_source: Mapping[str, int]) -> dict[str, int]:
        val = self.held_out(n_source["train"])
        return {"train": n_source["train"] - val, "val": val, "test": n_source["test"]}

    def read(self, workers: int | None, data_dir: Path | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns levels (n, pixels * channels) uint8 and labels (n,) of the source's splits, train and test."""
        from lra.tasks.decoding import decode_images
        from lra.tasks.sources import read_source

        source = read_source(self, data_dir, self.columns)
        return decode_images(source, self.shape, self.n_classes, workers, self.name)

    def arrange(self, levels: np.ndarray) -> np.ndarray:
        """Returns images (n, pixels * channels) in the order in which the pixels are read."""
        return levels

    def generate(self, workers: int | None, data_dir: Path | None) -> dict[str, Dataset]:
        """Returns the splits; see the base.

        Raises:
            ValueError: the source cannot be read, holds another kind of image, or not those asked for.
        """
        from lra.tasks.draws import permutation
        from lra.tasks.sources import count_rows

        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        source = self.read(workers, data_dir)
        n_source = {split: len(labels) for split, (_, labels) in source.items()}
        sizes = count_rows(self, self._available(n_source), self._available(self.n_source))
        shuffled = {split: permutation(n, self.seed, origin) for origin, (split, n) in enumerate(n_source.items())}
        n_val = self.held_out(n_source["train"])
        order = {"train": shuffled["train"][n_val:], "val": shuffled["train"][:n_val], "test": shuffled["test"]}
        splits: dict[str, Dataset] = {}
        for split in SPLITS:
            origin = "test" if split == "test" else "train"
            levels, labels = source[origin]
            index = order[split][: sizes[split]]
            splits[split] = _dataset(self.arrange(levels[index]), labels[index], index, origin == "test")
        return splits

    def source(self, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
        from lra.tasks.sources import describe_source

        return describe_source(self, data_dir, hashes)

    def picture(self, splits: Mapping[str, Dataset], path: Path) -> None:
        """Writes a contact sheet of training images as they are read, a column for each class."""
        import numpy as np

        from lra.tasks.base import column
        from lra.tasks.pictures import contact_sheet

        label = column(splits["train"], "label")
        of_class = [np.flatnonzero(label == c)[:4] for c in range(self.n_classes)]
        deep = min(len(rows) for rows in of_class) or 1  # a class without an image leaves its column out
        shown = np.array([rows[:deep] for rows in of_class if len(rows)]).T.ravel()
        levels = np.array(splits["train"].select_columns(["input_ids"])[shown]["input_ids"], dtype=np.uint8)
        height, width, channels = self.shape
        size = (height, width, channels) if channels > 1 else (height, width)
        bright = levels.reshape(-1, *size) * np.uint8(255 // (self.n_levels - 1))
        names = [self.classes[c] for c in label[shown]]
        contact_sheet(bright, names, path, columns=sum(1 for rows in of_class if len(rows)))


@dataclass(frozen=True, kw_only=True)
class Image(Images):
    """Image of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006): CIFAR-10 in gray, 1,024 pixels.

    Gray is 0.299 R + 0.587 G + 0.114 B, rounded; a source of gray images is taken as it is. The benchmark's own models
    read the levels as tokens, the S4 family as real values (x - 122.6) / 61.0, here the default.
    """

    name: ClassVar[str] = "image"
    summary: ClassVar[str] = "CIFAR-10 in gray, pixel by pixel (Image of the Long Range Arena)"
    hub: ClassVar[str | None] = "uoft-cs/cifar10"
    folders: ClassVar[tuple[str, ...]] = ("cifar10_gray", "cifar10")
    columns: ClassVar[dict[str, str]] = {"img|image": "image", "label": "label"}
    shape: ClassVar[tuple[int, int, int]] = (32, 32, 1)
    classes: ClassVar[tuple[str, ...]] = CIFAR
    n_source: ClassVar[dict[str, int]] = {"train": 50_000, "test": 10_000}
    benchmark_rows: ClassVar[dict[str, int]] = {"train": 45_000, "val": 5_000, "test": 10_000}
    mean: ClassVar[float] = 122.6
    std: ClassVar[float] = 61.0


@dataclass(frozen=True, kw_only=True)
class SCifar(Images):
    """Sequential CIFAR-10 in colour: 1,024 positions of red, green and blue.

    This is the sCIFAR of the LRU paper (Orvieto et al. 2023, arXiv:2303.06349, appendix D.4); it is not the Image task
    of the Long Range Arena, which is gray, and their accuracies do not belong in one column. As tokens the channels
    follow one another, 3,072 positions.
    """

    name: ClassVar[str] = "scifar"
    summary: ClassVar[str] = "CIFAR-10 in colour, pixel by pixel (sCIFAR of the LRU paper)"
    hub: ClassVar[str | None] = "uoft-cs/cifar10"
    folders: ClassVar[tuple[str, ...]] = ("cifar10",)
    columns: ClassVar[dict[str, str]] = {"img|image": "image", "label": "label"}
    shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)
    classes: ClassVar[tuple[str, ...]] = CIFAR
    n_source: ClassVar[dict[str, int]] = {"train": 50_000, "test": 10_000}
    mean: ClassVar[float] = 120.7  # of all three channels together
    std: ClassVar[float] = 64.15


@dataclass(frozen=True, kw_only=True)
class SMnist(Images):
    """Sequential MNIST (Le et al. 2015, arXiv:1504.00941): 784 pixels in raster order."""

    name: ClassVar[str] = "smnist"
    summary: ClassVar[str] = "MNIST, pixel by pixel"
    hub: ClassVar[str | None] = "ylecun/mnist"
    ink: ClassVar[bool] = True
    folders: ClassVar[tuple[str, ...]] = ("mnist",)
    columns: ClassVar[dict[str, str]] = {"image|img": "image", "label": "label"}
    shape: ClassVar[tuple[int, int, int]] = (28, 28, 1)
    classes: ClassVar[tuple[str, ...]] = DIGITS
    n_source: ClassVar[dict[str, int]] = {"train": 60_000, "test": 10_000}
    mean: ClassVar[float] = 33.3
    std: ClassVar[float] = 78.6


@dataclass(frozen=True, kw_only=True)
class PSMnist(SMnist):
    """Permuted sequential MNIST (Le et al. 2015, arXiv:1504.00941): 784 pixels, all images in one other order.

    The order is either drawn by the seed, as in most papers, or the bit reversal of the S4 family. Since 784 is no
    power of two, that is the bit reversal of 0 to 1,023 (ten bits read backwards) without the numbers of 784 and more.
    """

    permutation: Literal["random", "bit_reversal"] = "random"
    """Order of the pixels: random, drawn by the seed, or bit_reversal."""

    name: ClassVar[str] = "psmnist"
    summary: ClassVar[str] = "MNIST, its pixels in one random order"

    def order(self) -> np.ndarray:
        """Returns which pixel of the raster is read at each position, (784,)."""
        import numpy as np

        from lra.tasks.draws import permutation

        n = self.shape[0] * self.shape[1]
        if self.permutation == "random":
            return permutation(n, self.seed, 2)  # 0 and 1 shuffle the source's rows
        bits = (n - 1).bit_length()
        backwards = np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)])
        return backwards[backwards < n]

    def arrange(self, levels: np.ndarray) -> np.ndarray:
        return levels[:, self.order()]


def _dataset(levels: np.ndarray, labels: np.ndarray, index: np.ndarray, origin: bool) -> Dataset:
    import numpy as np
    import pyarrow as pa

    from lra.tasks.in_memory import in_memory

    n, size = levels.shape
    columns = {
        "input_ids": pa.ListArray.from_arrays(
            pa.array(np.arange(0, n * size + 1, size, dtype=np.int32)), levels.reshape(-1)
        ),
        "label": pa.array(labels.astype(np.uint8)),
        "index": pa.array(index.astype(np.int32)),
        "origin": pa.array(np.full(n, origin, np.uint8)),
    }
    return in_memory(pa.table(columns))
