"""Worker processes of a sweep: one that dies, an order to stop, a parent that is gone, time and failures together."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lra import pool
from lra.config import Cell
from lra.interrupt import TIME_UP, Interrupted, listening
from lra.launch import Place

CODE = """
import sys
from tests.lra import test_pool
if __name__ == "__main__":
    test_pool.pool.attempt = test_pool.computing
    test_pool.pool.run_cells([test_pool.Cell(seed=3)], sys.argv[1], test_pool.Place(), None, 2)
"""


def acting(cell: Cell, runs_dir: str, place: Place, deadline: float | None) -> str | None:
    """Stands for a cell: what happens to it is in its seed."""
    if cell.seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.seed == 1:
        return "FloatingPointError: diverged"
    if cell.seed == 2:
        raise Interrupted("not begun", TIME_UP)
    (Path(runs_dir) / f"{cell.regime}{cell.seed}").touch()
    return None


def computing(cell: Cell, runs_dir: str, place: Place, deadline: float | None) -> None:
    """Stands for a cell that computes until it is told to stop, then saves."""
    with listening() as flag:
        (Path(runs_dir) / f"{cell.seed}.pid").write_text(str(os.getpid()))
        for _ in range(6000):
            if flag.signum is not None:
                (Path(runs_dir) / f"{cell.seed}.saved").touch()
                raise Interrupted("saved", flag.signum)
            time.sleep(0.01)


def wait_for(what, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def alive(path: Path) -> bool:
    try:
        os.kill(int(path.read_text()), 0)
    except ProcessLookupError:
        return False
    # a zombie whose new parent does not ask for it is gone as well
    return " Z " not in Path(f"/proc/{path.read_text()}/stat").read_text()


def test_a_dead_worker_fails_its_cell_and_the_others_get_new_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "attempt", acting)
    cells = [Cell(seed=0), *(Cell(seed=seed) for seed in (3, 4, 5)), Cell(seed=6, regime="pretrain")]
    failed, time_over = pool.run_cells(cells, str(tmp_path), Place(), None, 2)
    done = {path.name for path in tmp_path.iterdir()}
    assert failed[cells[0].key] == pool.DIED and len(failed) <= 2 and not time_over
    assert "pretrain6" in done and len(done) >= 3, "only the one that ran beside the dead one may be missing"
    assert len(done) + len(failed) >= len(cells)


def test_failures_and_the_end_of_the_time_are_both_told(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "attempt", acting)
    cells = [Cell(seed=1), Cell(seed=2)]
    assert pool.run_cells(cells, str(tmp_path), Place(), None, 2) == (
        {cells[0].key: "FloatingPointError: diverged"},
        True,
    )


def test_an_order_to_stop_reaches_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "attempt", computing)

    def order() -> None:
        wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)  # to this process alone

    threading.Thread(target=order, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(Interrupted, match="what was running is saved") as caught:
        pool.run_cells([Cell(seed=seed) for seed in (3, 4, 5)], str(tmp_path), Place(), None, 2)
    assert caught.value.signum == signal.SIGTERM and time.monotonic() - began < 50
    assert {path.name for path in tmp_path.glob("*.saved")} == {"3.saved", "4.saved"}
    assert not any(alive(path) for path in tmp_path.glob("*.pid")) and not (tmp_path / "5.pid").exists()


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_leave_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(CODE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        path = tmp_path / "3.pid"
        wait_for(lambda: path.exists() and path.read_text())
        assert alive(path)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not alive(path), 10)
    assert not (tmp_path / "3.saved").exists()
