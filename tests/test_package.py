"""The package as it is installed: what it imports, how fast, and the wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, *options: str) -> str:
    run = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_linrnn_imports_neither_lra_nor_its_libraries():
    """torch, einops and safetensors are all that `import linrnn` may ask for."""
    code = """
import torch, sys
before = set(sys.modules)
import linrnn
print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    assert set(python(code).split()) <= {"linrnn", "torch", "einops", "safetensors", "_linrnn_editable"}


def test_lra_help_imports_no_torch():
    code = "import sys; sys.argv = ['lra', '--help']\nfrom lra.__main__ import main\n"
    code += "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'lightning' in sys.modules)"
    assert python(code).splitlines()[-1] == "False False"


@pytest.mark.slow
def test_the_wheel_installs_into_a_clean_environment(tmp_path):
    """`pip wheel .`, then that wheel in a new environment that borrows torch, and a scan on the compiled kernel."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("linrnn-*.whl")
    assert "-py3-none-" in wheel.name  # one wheel for every Python and torch
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("lra/configs/task/listops.yaml", "lra/__main__.py"):
        assert expected in names
    sources = [
        path for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh", "*.py") for path in (ROOT / "kernels").rglob(pattern)
    ]
    assert {f"linrnn/kernels/{path.relative_to(ROOT / 'kernels').as_posix()}" for path in sources} <= set(names)
    assert not any(name.startswith(("tests/", "kernels/", "configs/", "benchmarks/")) for name in names)

    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    interpreter = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    site = subprocess.check_output(
        [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    subprocess.run([str(interpreter), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    borrowed = next(p for p in sys.path if Path(p, "torch").is_dir())
    Path(site, "borrowed_torch.pth").write_text(borrowed + "\n")  # only the folder: the editable hook stays behind
    code = """
import torch, linrnn
print(linrnn.__file__)
linrnn.ops.diagonal_scan(torch.rand(3), torch.rand(1, 5, 3), backend="cpu")
"""
    run = subprocess.run([str(interpreter), "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert str(environment) in run.stdout
