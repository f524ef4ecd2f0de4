"""What is said where the Triton kernels cannot run, and that nothing imports Triton before it is needed."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from linrnn.kernels import triton
from linrnn.ops import delta_rule, linear_attention

ROOM = {"triton": "3.7.1", "capability": (9, 0), "hip": None}


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch):
    """Why the kernels cannot run on a machine like ROOM, but for what is given."""

    def ask(**machine):
        pytest.importorskip("triton")
        machine = ROOM | machine

        def version(name: str) -> str:
            if machine["triton"] is None:
                raise PackageNotFoundError(name)
            return machine["triton"]

        def capability(device_index: int) -> tuple[int, int]:
            if machine["capability"] is None:
                raise RuntimeError("no NVIDIA driver")
            return machine["capability"]

        monkeypatch.setattr(triton, "version", version)
        monkeypatch.setattr(torch.version, "hip", machine["hip"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device_index: "some GPU")
        return triton.unavailable.__wrapped__(0)

    return ask


def test_nothing_stands_in_the_way(reason):
    assert reason() is None
    assert reason(triton="3.10.0+git1") is None


@pytest.mark.parametrize(
    ("machine", "words"),
    (
        ({"triton": None}, ("Triton is not installed", "pip install 'triton>=3.6'")),
        ({"triton": "3.5.2"}, ("Triton is 3.5.2", "3.6 or newer", "pip install 'triton>=3.6'")),
        ({"capability": None}, ("not usable", "RuntimeError: no NVIDIA driver")),
        ({"capability": (7, 5)}, ("some GPU has compute capability 7.5", "8.0 or newer")),
        ({"hip": "6.4"}, ("AMD",)),
    ),
)
def test_reasons_and_cures(reason, machine, words):
    said = reason(**machine)
    assert said is not None
    for word in words:
        assert word in said


@pytest.mark.parametrize("delta", (False, True))
def test_triton_needs_cuda_tensors(delta):
    q, beta = torch.randn(1, 4, 1, 16), torch.rand(1, 4, 1)
    with pytest.raises(ValueError, match="backend='triton' runs on CUDA tensors, got tensors on cpu"):
        if delta:
            delta_rule(q, q, q, beta, backend="triton")
        else:
            linear_attention(q, q, q, backend="triton")


def test_ops_run_without_importing_triton():
    code = """
import sys, torch
sys.modules["triton"] = None  # importing it now fails
import linrnn.kernels.triton
from linrnn.ops import linear_attention
q = torch.randn(1, 4, 1, 16)
linear_attention(q, q, q)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
