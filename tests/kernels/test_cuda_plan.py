"""The rule of linrnn.kernels.cuda.plan: its words hold, and every plan is one that a device can run."""

from hypothesis import given
from hypothesis import strategies as st

from linrnn.kernels.cuda.driver import DeviceProperties
from linrnn.kernels.cuda.plan import (
    CARRY_WIDTH,
    MAX_THREADS,
    MIN_PANEL,
    SHORT,
    STAGES,
    UNDER_WAY,
    Plan,
    choose_plan,
    fitted,
)

H200 = DeviceProperties("H200", (9, 0), 132, 60 << 20, 227 << 10, (13, 0))
T4 = DeviceProperties("T4", (7, 5), 40, 4 << 20, 64 << 10, (12, 4))
A10 = DeviceProperties("A10", (8, 6), 72, 6 << 20, 99 << 10, (12, 4))
UNKNOWN = H200._replace(l2_bytes=0)
FP32 = {"row_bytes": 8}  # a varying in time: a and x in


def blocks(plan: Plan, columns: int, T: int) -> int:
    return -(-columns * -(-T // plan.chunk) // plan.threads) if plan.chunk else -(-columns // plan.width)


@given(
    columns=st.integers(1, 10**7),
    T=st.integers(1, 10**8),
    row_bytes=st.sampled_from((2, 4, 8, 12, 16, 24, 32, 48)),
    exchange_bytes=st.sampled_from((24, 48, 64, 96)),
    device=st.sampled_from((H200, T4, A10, UNKNOWN)),
)
def test_every_plan_can_run(columns, T, row_bytes, exchange_bytes, device):
    chosen = choose_plan(columns, T, row_bytes, device)
    plan = fitted(chosen, row_bytes, exchange_bytes, device)
    assert 32 <= plan.threads <= MAX_THREADS and plan.threads % 32 == 0
    assert plan.rows >= 1 and plan.width >= 1
    shared = plan.ring_bytes(row_bytes) + (plan.threads * exchange_bytes if plan.segments > 1 else 0)
    assert shared <= device.shared_bytes_per_block
    if plan.chunk:
        assert plan.segments == 1 and 1 <= plan.chunk
        assert 0 <= plan.panel < T and (plan.panel == 0 or plan.chunk <= plan.panel)
        # three launches for each panel, which has to be worth them
        assert plan.panel == 0 or plan.panel * columns * row_bytes >= MIN_PANEL / 2
    assert blocks(plan, columns, plan.panel or T) < 2**31


def test_many_columns_take_a_thread_each_and_deep_rings():
    plan = choose_plan(8 * 2048, 4096, device=H200, **FP32)
    assert plan.segments == 1 and not plan.chunk
    resident = 8 * 2048 / H200.multiprocessors  # threads of a multiprocessor
    assert UNDER_WAY / 2 <= STAGES * plan.rows * resident * 8 <= UNDER_WAY


def test_fewer_share_tiles_and_still_give_every_multiprocessor_a_block():
    for B, D in ((4, 256), (8, 512), (1, 2048), (16, 512)):
        plan = choose_plan(B * D, 512, device=H200, **FP32)
        assert not plan.chunk and plan.threads == MAX_THREADS
        assert blocks(plan, B * D, 512) >= min(H200.multiprocessors, B * D // 8) * 0.9


def test_few_columns_are_cut_in_time():
    plan = choose_plan(64, 131_072, device=H200, **FP32)
    chunks = -(-131_072 // plan.chunk)
    assert 64 * chunks >= 200 * H200.multiprocessors and plan.panel == 0
    assert choose_plan(64, SHORT, device=H200, **FP32).chunk == 0


def test_panels_fit_in_the_cache_where_the_cache_is_worth_it():
    long = choose_plan(64, 2_097_152, device=H200, **FP32)
    assert MIN_PANEL <= long.panel * 64 * 8 <= 3 * H200.l2_bytes // 4 + 64 * 8
    for device in (T4, A10, UNKNOWN):
        assert choose_plan(64, 2_097_152, device=device, **FP32).panel == 0


def test_a_short_sequence_has_no_idle_threads():
    plan = choose_plan(64, 5, device=H200, **FP32)
    assert plan.threads == 32


def test_a_device_with_little_room_gets_smaller_rings():
    plan = fitted(Plan(8, 32, 8), 48, 96, T4)
    assert plan.ring_bytes(48) + plan.threads * 96 <= T4.shared_bytes_per_block
    assert plan.rows < 8
    assert fitted(Plan(256, 1, 1), 64, 0, T4._replace(shared_bytes_per_block=16 << 10)).threads < 256


def test_constants_are_those_of_the_sources():
    from linrnn.kernels.cuda import compiler

    source = compiler.read("diagonal_scan.cu")
    text = "\n".join(header for _, header in source.headers)
    assert f"kStages = {STAGES};" in text and f"kMaxThreads = {MAX_THREADS};" in text
    assert MAX_THREADS % CARRY_WIDTH == 0
