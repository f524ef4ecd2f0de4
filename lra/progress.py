"""One progress line per run: a bar on a terminal, a plain line every few seconds elsewhere."""

import multiprocessing
import sys
import time
from typing import Any

from lightning.pytorch.callbacks import Callback

EVERY = 10.0  # seconds between plain lines


class Progress(Callback):
    """Shows step, speed, loss, validation metric, elapsed and remaining time of a run called `label`.

    Args:
        label: of the run.
        steps: of the run in all.
        metric: what the validation score is called.
        quiet: show nothing: another process speaks for this one.
    """

    def __init__(self, label: str, steps: int, metric: str = "accuracy", quiet: bool = False):
        self.label, self.steps, self.metric, self.quiet = label, steps, metric, quiet
        self.loss = self.value = float("nan")
        self.bar: Any = None
        self.started = self.shown = 0.0
        self.first = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = self.shown = time.monotonic()
        self.first = trainer.global_step
        # parallel bars would overwrite one another
        if not self.quiet and sys.stderr.isatty() and multiprocessing.parent_process() is None:
            from tqdm import tqdm

            self.bar = tqdm(total=self.steps, initial=self.first, desc=self.label, unit="step", dynamic_ncols=True)

    def note(self, loss: float | None = None, value: float | None = None) -> None:
        """Takes the newest training loss or validation score."""
        self.loss = self.loss if loss is None else loss
        self.value = self.value if value is None else value

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, now = trainer.global_step, time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(self._numbers(), refresh=False)
            self.bar.update(step - self.bar.n)
        elif not self.quiet and (now - self.shown >= EVERY or step == self.steps):
            self.shown, elapsed = now, now - self.started
            speed = (step - self.first) / max(elapsed, 1e-9)
            left = (self.steps - step) / max(speed, 1e-9)
            parts = [f"step {step}/{self.steps}", f"{speed:.1f} steps/s", self._numbers(), f"{elapsed:.0f} s"]
            line = ", ".join(part for part in parts if part)
            print(f"{self.label}: {line}, {left:.0f} s left", file=sys.stderr, flush=True)

    def _numbers(self) -> str:
        parts = [f"loss {self.loss:.3f}"] if self.loss == self.loss else []
        parts += [f"val {self.metric} {self.value:.3f}"] if self.value == self.value else []
        return ", ".join(parts)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
