"""Which memory to decode with: bytes, block evaluations and seconds of each, predicted before anything is decoded."""

from collections.abc import Callable
from dataclasses import dataclass

from linrnn.decode._job import Choice, Job
from linrnn.decode._memories import MEMORIES
from linrnn.decode.attention import BLOCK_SIZE, AttentionDecoder
from linrnn.decode.calibration import Calibration
from linrnn.layers.base import positive_int
from linrnn.models.language import LanguageModel


class NoPlan(ValueError):
    """No memory fits the budget and ends in time; the message has the numbers."""


@dataclass(frozen=True)
class Plan:
    """The choices for a job, one for each memory, and the fastest of those that fit: `print(plan)` shows a table.

    `blocks` has block recursion at every block size that was looked at: the curve of time against memory.
    """

    model: LanguageModel
    length: int
    new_tokens: int
    memory_budget: int | None
    time_limit: float
    choices: tuple[Choice, ...]
    blocks: tuple[Choice, ...]

    @property
    def chosen(self) -> Choice:
        """The fastest choice within the budget."""
        return min((choice for choice in self.choices if self.fits(choice)), key=lambda choice: choice.seconds)

    def fits(self, choice: Choice) -> bool:
        """Whether a choice is within budget and time limit."""
        return choice.seconds <= self.time_limit and (self.memory_budget is None or choice.bytes <= self.memory_budget)

    def decoder(self) -> AttentionDecoder:
        """Returns a decoder with the chosen memory."""
        block_size = None if self.chosen.memory == "constant" else self.chosen.block_size
        return AttentionDecoder(self.model, memory=self.chosen.memory, block_size=block_size)

    def __str__(self) -> str:
        budget = "any" if self.memory_budget is None else show_bytes(self.memory_budget)
        last = "last token" if self.new_tokens == 1 else f"last {self.new_tokens} tokens"
        head = ("memory", "block", "state", "in all", "evaluations", "time", "")
        rows: list[tuple[str, ...]] = [head]
        for choice in self.choices:
            over = self.memory_budget is not None and choice.bytes > self.memory_budget
            verdict = "over budget" if over else "too slow" if not self.fits(choice) else ""
            if not verdict and choice == self.chosen:
                verdict = "chosen"
            sizes = show_bytes(choice.state_bytes), show_bytes(choice.bytes)
            evaluations = show_count(sum(choice.evaluations))
            rows.append(
                (choice.memory, str(choice.block_size), *sizes, evaluations, show_seconds(choice.seconds), verdict)
            )
        title = (
            f"logits of the {last} of {self.length}; memory budget: {budget}, "
            f"time limit: {show_seconds(self.time_limit)}"
        )
        return f"{title}\n{aligned(rows)}"


def plan(
    model: LanguageModel,
    length: int,
    memory_budget: float | None = None,
    *,
    new_tokens: int = 1,
    batch_size: int = 1,
    block_size: int | None = None,
    time_limit: float = 3600.0,
    calibration: Calibration | None = None,
) -> Plan:
    """Predicts what each memory of `AttentionDecoder` costs for a job, and chooses the fastest that fits.

    The job: logits of the last `new_tokens` of `length` tokens. The first length - new_tokens + 1 are read in one call
    (`extend`), the others one by one (`step`); new_tokens=1 is one call of `decode.attention`. State and evaluations
    are formulas; seconds are the evaluations times the cost of one, which is measured first: seconds, more
    for a slow model. With a window, counting what block recursion evaluates takes time in
    the number of blocks, and at a million tokens some twenty seconds.

    Args:
        model: a LanguageModel whose mixers are causal softmax attention, in evaluation mode.
        length, new_tokens: the job.
        memory_budget: a whole number of bytes (1e9 is one) that caches, frames, ids and temporaries may take, the
            weights not among them; None: any.
        batch_size: sequences decoded together.
        block_size: tokens evaluated together; if None, 256, and for "block" what is fastest within the budget.
        time_limit: seconds the job may take.
        calibration: measurements to use again, of the same model and batch size.

    Raises:
        NoPlan: (a ValueError) no choice is within budget and time limit; the message is the table.
        ValueError: a length, number of tokens, budget or limit that is none.
    """
    positive_int("length", length)
    if positive_int("new_tokens", new_tokens) > length:
        raise ValueError(f"new_tokens: expected at most length = {length}, got {new_tokens}")
    budget = None if memory_budget is None else bytes_budget(memory_budget)
    if not isinstance(time_limit, (int, float)) or isinstance(time_limit, bool) or not time_limit > 0:
        raise ValueError(f"time_limit: expected seconds > 0, got {time_limit!r}")
    if block_size is not None:
        positive_int("block_size", block_size)
    if calibration is None:
        calibration = Calibration(model, batch_size=batch_size)
    elif calibration.stack.model is not model or calibration.batch_size != batch_size:
        raise ValueError(f"calibration: expected one of this model and batch_size = {batch_size}, got another")
    job = Job(calibration, length - new_tokens + 1, length)
    sizes = [4**e for e in range(1, 32) if 4 ** (e - 1) < length] if block_size is None else [block_size]
    blocks = tuple(job.choice("block", size) for size in sizes)

    def rank(choice: Choice) -> tuple[bool, float]:
        over = budget is not None and choice.bytes > budget
        return over, choice.bytes if over else choice.seconds

    choices = []
    for memory in MEMORIES:
        if memory == "block":
            choices.append(min(blocks, key=rank))
        else:
            choices.append(job.choice(memory, 1 if memory == "constant" else block_size or BLOCK_SIZE))
    found = Plan(model, length, new_tokens, budget, time_limit, tuple(choices), blocks)
    if not any(found.fits(choice) for choice in choices):
        raise NoPlan(f"memory_budget, time_limit: no choice is within both; {found}")
    return found


def bytes_budget(value: float) -> int:
    """Returns a budget as an integer; 1e9 is a way to write one."""
    whole = isinstance(value, float) and value.is_integer()
    return positive_int("memory_budget", int(value) if whole else value)  # type: ignore[arg-type]


def show_bytes(n: float) -> str:
    """12.3 KiB and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def show_count(n: int) -> str:
    """A whole number, or its size."""
    return f"{n:,}" if n < 10**9 else f"1e{len(str(n)) - 1}" if n > 10**300 else f"{n:.1e}"


def show_seconds(s: float) -> str:
    """3.2 ms, 4.5 s, 2.1 h, 3e+05 years and the like."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if s >= size:
            return f"{s / size:.3g} {unit}"
    return f"{1e3 * s:.3g} ms"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Lays out a table: the first column to the left, and the last; those between to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    side: list[Callable] = [str.ljust, *[str.rjust] * (len(widths) - 2), str.ljust]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(side, row, widths, strict=True)).rstrip() for row in rows
    )
