"""How a selective scan is laid out on a GPU: threads of a block, tokens of a stage, and chunks of time.

The rule, in words (a warp has 64 / lanes channels, or 32 / lanes in double precision; a block at most 128 threads):

- The work is bound by arithmetic, so what counts is that each scheduler of each multiprocessor has a warp, better two.
- Where the blocks do not come to two for each multiprocessor they are made smaller, down to a warp, to spread.
- Where there are still fewer warps than would keep half of the schedulers busy (all of them in the backward) and T is
  long, time is cut into chunks, as many as give each scheduler two warps. That costs the forward its exponentials once
  more, and the backward a third of them.

The numbers are estimates from counts of instructions; `benchmarks/selective_scan_gpu.py` measures what they give.
"""

from dataclasses import dataclass

from linrnn.kernels.cuda.driver import DeviceProperties

SLOTS = 2  # kSlots of selective_scan.cuh
SCHEDULERS = 4  # of a multiprocessor
FORWARD_STAGE = 32
MIN_CHUNK = 64  # tokens
WARP, MAX_THREADS = 32, 128  # kWarp and kThreads


@dataclass(frozen=True)
class Tile:
    """What a thread has: `states` of N states of each of V channels; `lanes` threads share a channel."""

    V: int
    lanes: int
    states: int

    @property
    def padded(self) -> int:
        return self.lanes * self.states

    def channels(self, threads: int) -> int:
        return threads // self.lanes * self.V


@dataclass(frozen=True)
class Plan:
    """The layout of one pass."""

    threads: int
    """of a block"""
    stage: int
    """tokens of a slot of the ring; in the backward those between two checkpoints"""
    chunk: int = 0
    """tokens of a chunk of time; 0: all"""


@dataclass(frozen=True)
class Problem:
    """What a plan depends on. Widths are in channels, sizes in bytes."""

    B: int
    T: int
    G: int
    of_group: int
    tile: Tile
    x_bytes: int
    state_bytes: int

    @property
    def group(self) -> int:
        """Tokens that are in registers together: kGroup."""
        return 2 if self.state_bytes * self.tile.V * self.tile.states > 32 else 4

    def blocks(self, threads: int) -> int:
        return self.B * self.G * -(-self.of_group // self.tile.channels(threads))


def most_states() -> int:
    """The largest N that a tile takes."""
    return 8 * WARP


def choose_tile(N: int, wide: bool) -> Tile:
    """For N states; `wide` where the arithmetic is in double precision."""
    states = 4 if N <= 4 * WARP else 8
    lanes = 2
    while lanes * states < N:
        lanes *= 2
    return Tile(1 if wide or states == 8 else 2, lanes, states)


def shared_bytes(problem: Problem, threads: int, stage: int, backward: bool, reduces: bool = False) -> int:
    """Of a block of `selective_scan`, or of `selective_reduce`."""
    tile, number = problem.tile, problem.state_bytes
    row, coefficients = stage * tile.channels(threads), stage * tile.padded * number
    of_x = row * problem.x_bytes if not (backward and reduces) else 0
    of_y = row * number if backward else 0
    slot = sum(_up(n) for n in (row * number, of_x, of_y, coefficients, 0 if reduces else coefficients, stage))
    if reduces or not backward:
        return SLOTS * slot
    tiles = (SLOTS + 1 + (stage - 1) // problem.group) * tile.V * tile.states * threads
    sums = threads // WARP * problem.group * 2 * tile.padded
    return SLOTS * slot + (tiles + sums) * number


def choose_plan(problem: Problem, backward: bool, spacing: int, device: DeviceProperties) -> Plan:
    """The plan of one pass.

    In the backward `stage` is less than `spacing` where a block has no room for so many tokens: then the caller
    computes checkpoints that are as close.
    """
    processors = device.multiprocessors
    threads = MAX_THREADS
    while threads > WARP and problem.blocks(threads) < 2 * processors:
        threads //= 2
    stage = spacing if backward else FORWARD_STAGE
    while shared_bytes(problem, threads, stage, backward) > device.shared_bytes_per_block:
        if threads > (2 * WARP if stage > problem.group else WARP):
            threads //= 2
        elif stage > 1:
            stage = -(-stage // 2)
        else:
            raise ValueError(f"{device.name} has too little shared memory for {problem}")
    warps = problem.blocks(threads) * threads // WARP
    enough = SCHEDULERS * processors if backward else SCHEDULERS * processors // 2
    if warps >= enough or problem.T < 2 * MIN_CHUNK:
        return Plan(threads, stage)
    chunks = min(-(-2 * SCHEDULERS * processors // warps), problem.T // MIN_CHUNK)
    chunk = -(-problem.T // chunks)
    return Plan(threads, stage, -(-chunk // stage) * stage)


def _up(n: int) -> int:
    return -(-n // 16) * 16
