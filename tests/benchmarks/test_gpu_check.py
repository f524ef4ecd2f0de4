"""benchmarks/gpu_check.sh with a stand-in for Python, which claims to see a GPU and writes down what it is to run."""

import os
import shutil
import subprocess
import tarfile

import pytest

STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  *"sys.exit(not torch.cuda.is_available())"*) exit "${NO_GPU:-0}" ;;
  *get_device_capability*) echo 9.0 ;;
  *$BROKEN*) echo "Error: broken on purpose"; exit 3 ;;
  *"-m pytest"*) echo "7 passed in 1 s" ;;
  *layer_gpu*) echo "**d = 512: the LRU layer is faster**" ;;
esac
"""


@pytest.fixture
def check(scripts, tmp_path):
    """Runs the script; returns the exit code, the summary, the calls of Python and the names of the logs."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("gpu_check.sh needs bash and coreutils")
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(**environment):
        settings = {"PYTHON": python, "CALLS": calls, "OUT": out, "BROKEN": "nothing", **environment}
        command = ["bash", str(scripts / "gpu_check.sh")]
        result = subprocess.run(command, env=os.environ | {k: str(v) for k, v in settings.items()}, capture_output=True)
        with tarfile.open(out / "logs.tar.gz") as archive:
            names = [os.path.basename(name) for name in archive.getnames()]
        assert (out / "summary.txt").read_text() in result.stdout.decode()
        return result.returncode, (out / "summary.txt").read_text(), calls.read_text(), names

    return run


def test_every_step_in_its_order(check):
    code, summary, calls, logs = check()
    assert code == 0, summary
    parts = ("compile_kernels.py", "not slow", "gpu and slow", "scan_gpu.py --quick", "layer_gpu.py", "--sweep --quick")
    places = [calls.index(part) for part in parts]
    assert places == sorted(places)
    for name in (
        "install",
        "facts",
        "compile",
        "tests",
        "slow_tests",
        "scan_quick",
        "layer",
        "ssm",
        "decode",
        "sanitizer",
        "sweep",
        "scan",
    ):
        assert f"{name}: ok, " in summary and f"{name}.log" in logs
    assert "    7 passed in 1 s" in summary and "    **d = 512" in summary and len(summary) < 12_000


def test_a_step_that_fails_leaves_the_others_running(check):
    code, summary, _, _ = check(BROKEN="compile_kernels")
    assert code == 1
    assert "compile: FAILED with code 3" in summary and "Error: broken on purpose" in summary
    assert "tests: ok, " in summary and "layer: ok, " in summary


def test_no_time_left(check):
    code, summary, _, _ = check(GPU_CHECK_SECONDS=0)
    assert code == 1 and "tests: not run: no time was left" in summary


def test_no_gpu(check):
    code, summary, calls, _ = check(NO_GPU=1)
    assert code == 2 and "no GPU: only the steps that need none have run" in summary
    assert "--collect-only" in calls and "--dry-run" in calls and "--quick" not in calls
    assert "ssm.py --groups scan --size" in calls and "cuda" not in calls.split("ssm.py")[1]
    code, summary, _, _ = check(NO_GPU=1, BROKEN="collect-only")
    assert code == 1 and "tests: FAILED" in summary
