"""What the cells of a comparison share, the presets, and the command line that gives such settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison share.

    d_model, n_layers: width D and number of blocks of the model with attention; the others are as large.
    lengths: windows in training; each divides the longest. A batch is cut from chunks of the longest, so that models
        of all lengths predict the same bytes in the same steps and differ in what they see of the past.
    batch_bytes: bytes predicted in a step.
    cell_bytes: bytes predicted in a cell.
    rates: learning rates to choose from, each mixer's by validation after trial_bytes, at the shortest length.
    test_bytes, validation_bytes: how many bytes are predicted in evaluations, of the test and the validation files.
    """

    d_model: int
    n_layers: int
    lengths: tuple[int, ...]
    batch_bytes: int
    cell_bytes: int
    rates: tuple[float, ...]
    trial_bytes: int
    test_bytes: int
    validation_bytes: int
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0
    evaluations: int = 10
    autocast: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or any(self.longest % length for length in self.lengths):
            raise ValueError(f"lengths: expected divisors of the longest, >= 1, got {self.lengths}")
        if self.batch_bytes < 1 or self.batch_bytes % self.longest:
            raise ValueError(f"batch_bytes: expected a multiple of {self.longest}, got {self.batch_bytes}")
        for name in ("cell_bytes", "trial_bytes"):
            if getattr(self, name) < self.evaluations * self.batch_bytes:
                least = self.evaluations * self.batch_bytes
                raise ValueError(
                    f"{name}: expected at least {least} ({self.evaluations} steps), got {getattr(self, name)}"
                )
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise ValueError(f"rates: expected learning rates > 0, got {self.rates}")

    @property
    def longest(self) -> int:
        return max(self.lengths)


PRESETS = {
    # one core: an hour for three seeds; 0.23 million parameters
    "cpu": Settings(
        d_model=64,
        n_layers=4,
        lengths=(128, 512),
        batch_bytes=1024,
        cell_bytes=1_638_400,
        rates=(1e-3, 3e-3, 1e-2),
        trial_bytes=327_680,
        test_bytes=262_144,
        validation_bytes=32_768,
    ),
    # one GPU: hours; 14 million parameters
    "gpu": Settings(
        d_model=384,
        n_layers=8,
        lengths=(128, 512, 2048),
        batch_bytes=65_536,
        cell_bytes=200_015_872,
        rates=(3e-4, 1e-3, 3e-3),
        trial_bytes=20_971_520,
        test_bytes=1_048_576,
        validation_bytes=262_144,
        autocast=True,
        compile=True,
    ),
    # seconds: shows that everything runs
    "test": Settings(
        d_model=32,
        n_layers=1,
        lengths=(16, 64),
        batch_bytes=512,
        cell_bytes=20_480,
        rates=(1e-2,),
        trial_bytes=5_120,
        test_bytes=4_096,
        validation_bytes=1_024,
        evaluations=4,
    ),
}
OPTIONS = (
    "d_model",
    "n_layers",
    "cell_bytes",
    "trial_bytes",
    "batch_bytes",
    "lengths",
    "rates",
)  # instead of a preset's


def options(settings: Mapping[str, Any]) -> str | None:
    """The options of `train` that give the settings of a results file, or None if no preset is that near."""
    for name, preset in PRESETS.items():
        other = {key: value for key, value in settings.items() if listed(asdict(preset).get(key)) != listed(value)}
        if other.keys() <= set(OPTIONS):
            words = [f"--{key.replace('_', '-')} {' '.join(map(str, listed(value)))}" for key, value in other.items()]
            return " ".join([f"--preset {name}", *words])
    return None


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]
