"""How a scan is laid out on a GPU: which of the two shapes of scan.cuh, and how large its pieces.

The rule, in words (a column is V adjacent channels, V = 2 for half precision and else 1):

- Bytes under way. A GPU moves data at full speed when about 4 MB are on the way at any time; UNDER_WAY bytes for each
  multiprocessor, in the rings of its threads, are enough for that with some to spare.
- Many columns (96 for each multiprocessor and more): a thread to a column, deep rings.
- Fewer: a block of 256 threads takes 32, 16 or 8 columns, the widest that still gives every multiprocessor a block, and
  its threads share each tile of time. Every input is still read once, in one launch.
- Too few columns for that (less than 4 for each multiprocessor) and a long T: time is cut into chunks, as many as give
  each multiprocessor 256 threads, and three launches scan them. Inputs are read twice. Where they are more than twice
  what three quarters of the L2 cache hold, they go panel by panel, each of that size; but not where a panel would be
  less than MIN_PANEL bytes: three launches then cost more than reading again.

The numbers are first estimates from bytes and latencies; `benchmarks/scan_gpu.py --sweep` measures a plan's
neighbours.
"""

from dataclasses import dataclass, replace

from linrnn.kernels.cuda.driver import DeviceProperties

STAGES = 4  # kStages of stream.cuh
MAX_THREADS = 256  # kMaxThreads of device.cuh
UNDER_WAY = 64 * 1024
CARRY_WIDTH = 8  # channels of a block of scan_carry
MIN_PANEL = 24 * 1024 * 1024
SHORT = 2048  # rows up to which three launches cost more than idle multiprocessors


@dataclass(frozen=True)
class Plan:
    """The layout of one scan. In the chunked shape `chunk` is its rows in a chunk, else 0."""

    width: int
    """columns of a block (sequential), all its threads (chunked)"""
    segments: int
    """threads to a column"""
    rows: int
    """rows of a stage of a thread's ring"""
    chunk: int = 0
    panel: int = 0
    """rows that go through the three chunked kernels together; 0: all of them"""

    @property
    def threads(self) -> int:
        return self.width * self.segments

    def ring_bytes(self, row_bytes: int) -> int:
        """Of a block; a thread has a slot to spare (stream.cuh)."""
        return (STAGES * self.rows + 1) * self.threads * row_bytes


def choose_plan(columns: int, T: int, row_bytes: int, device: DeviceProperties) -> Plan:
    """The plan for `columns` columns of T rows; row_bytes is what a thread reads of one row of its column."""
    processors = device.multiprocessors
    if columns < 4 * processors and T > SHORT:
        rows = _rows(8, MAX_THREADS, row_bytes)
        cached = 3 * device.l2_bytes // 4
        read = T * columns * row_bytes
        panels = -(-read // cached) if cached >= MIN_PANEL and read > 2 * cached else 1
        panel = -(-T // panels)
        chunks = max(2, 256 * processors // columns)
        chunk = -(-max(2 * rows, -(-panel // chunks)) // rows) * rows
        return Plan(128, 1, rows, chunk, panel if panels > 1 else 0)
    if columns >= 96 * processors:
        return Plan(64, 1, _rows(32, columns // processors, row_bytes))
    width = next((w for w in (32, 16) if columns >= w * processors), 8)
    segments = MAX_THREADS // width
    while segments * width > 32 and segments // 2 * 8 >= T:
        segments //= 2
    return Plan(width, segments, 8)


def fitted(plan: Plan, row_bytes: int, exchange_bytes: int, device: DeviceProperties) -> Plan:
    """The plan with smaller stages, or else fewer threads, until a block has room for its rings and for the exchange.

    exchange_bytes: what a thread tells the others where several share a column.
    """

    def shared_bytes(plan: Plan) -> int:
        return plan.ring_bytes(row_bytes) + (plan.threads * exchange_bytes if plan.segments > 1 else 0)

    while shared_bytes(plan) > device.shared_bytes_per_block:
        if plan.rows > 1:
            plan = replace(plan, rows=plan.rows // 2)
        elif plan.segments > 1 and plan.threads > 32:
            plan = replace(plan, segments=plan.segments // 2)
        else:
            plan = replace(plan, width=plan.width // 2)
    return plan


def _rows(most: int, threads: int, row_bytes: int) -> int:
    """Rows of a stage, a power of two, so that STAGES of them for so many threads come to UNDER_WAY bytes."""
    rows = most
    while rows > 4 and STAGES * rows * threads * row_bytes > UNDER_WAY:
        rows //= 2
    return rows
