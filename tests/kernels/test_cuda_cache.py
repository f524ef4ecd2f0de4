"""The cache of compiled CUDA programs: hits, damage, folders that cannot be written, many writers at once."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from linrnn.kernels import KernelUnavailable
from linrnn.kernels.cuda import __main__ as program_line
from linrnn.kernels.cuda import cache, compiler
from linrnn.kernels.cuda.compiler import Source
from linrnn.kernels.cuda.once import Once

SOURCE = Source("cuda/one.cu", "text", (("numbers.h", "more"),))
H200 = (9, 0)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """A cache folder of its own, which does not exist yet, and nothing in memory."""
    monkeypatch.setenv("LINRNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(cache, "_compiled", Once(cache._compile))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """Stands in for NVRTC 13.0: an image that tells what was asked for; returns the list of what was compiled."""
    done = []

    def compile_source(source, definitions, architecture):
        done.append((definitions, architecture))
        return f"{source} {definitions} {architecture}".encode(), ""

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "supported", lambda: (80, 90))
    return done


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(cache, "_compiled", Once(cache._compile))


def no_compiler():
    raise KernelUnavailable("no compiler; pip install one")


def test_compiled_once_then_read(monkeypatch, compilations, empty_cache):
    first = cache.obtain(SOURCE, ("A=1",), H200)
    forget(monkeypatch)
    assert cache.obtain(SOURCE, ("A=1",), H200) == first
    assert compilations == [(("A=1",), "sm_90")]
    (path,) = empty_cache.iterdir()
    assert path.name.startswith("one.sm_90.") and path.name.endswith(".nvrtc13.0")


@pytest.mark.parametrize("changed", ("text", "header", "name", "definitions", "order", "options", "device", "compiler"))
def test_whatever_goes_in_names_the_entry(monkeypatch, compilations, changed):
    before = cache.obtain(SOURCE, ("A=1", "B=2"), H200)
    source, definitions, capability = SOURCE, ("A=1", "B=2"), H200
    match changed:
        case "text":
            source = Source("cuda/one.cu", "texts", SOURCE.headers)
        case "header":
            source = Source("cuda/one.cu", "text", (("numbers.h", "less"),))
        case "name":
            source = Source("cuda/one.cu", "text", (("numbers.cuh", "more"),))
        case "definitions":
            definitions = ("A=1", "B=3")
        case "order":
            definitions = ("B=2", "A=1")
        case "options":
            monkeypatch.setattr(compiler, "OPTIONS", ("-std=c++20",))
        case "device":
            capability = (8, 0)
        case "compiler":
            monkeypatch.setattr(compiler, "version", lambda: (13, 1))
    cache.obtain(source, definitions, capability)
    assert len(compilations) == 2
    monkeypatch.undo()
    assert before == f"{SOURCE} ('A=1', 'B=2') sm_90".encode()


@pytest.mark.parametrize("damage", ("truncated", "empty", "flipped", "foreign"))
def test_a_damaged_entry_is_compiled_again(monkeypatch, compilations, empty_cache, damage):
    good = cache.obtain(SOURCE, (), H200)
    (path,) = empty_cache.iterdir()
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[:-1],
        "empty": b"",
        "flipped": bytes([whole[0] ^ 1]) + whole[1:],
        "foreign": good + b"otherfmt" + hashlib.sha256(good).digest(),
    }
    path.write_bytes(damaged[damage])
    forget(monkeypatch)
    assert cache.obtain(SOURCE, (), H200) == good
    assert len(compilations) == 2 and path.read_bytes() == whole


def failing(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ("is a file", "mkstemp", "write", "replace", "read", "utime", "no home"))
def test_a_folder_that_cannot_be_used_is_no_error(monkeypatch, compilations, empty_cache, broken, caplog):
    match broken:
        case "is a file":
            empty_cache.write_text("in the way")
        case "mkstemp":
            monkeypatch.setattr(cache.tempfile, "mkstemp", failing)
        case "write":
            monkeypatch.setattr(cache.os, "fdopen", lambda handle, mode: os.close(handle) or failing())
        case "replace":
            monkeypatch.setattr(cache.os, "replace", failing)
        case "read":
            monkeypatch.setattr(Path, "read_bytes", failing)
        case "utime":
            monkeypatch.setattr(cache.os, "utime", failing)
        case "no home":
            monkeypatch.setattr(cache, "folder", lambda: None)
    caplog.set_level("DEBUG", "linrnn")
    image = cache.obtain(SOURCE, (), H200)
    assert cache.obtain(SOURCE, (), H200) == image and len(compilations) == 1  # what the disk forgets, memory keeps
    assert len(caplog.records) <= 1 and all(record.levelname == "DEBUG" for record in caplog.records)
    if empty_cache.is_dir():
        assert not list(empty_cache.glob("*.tmp"))


def test_a_failed_compilation_is_kept_nowhere(monkeypatch, compilations, empty_cache):
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile_source", lambda *_: no_compiler())
        with pytest.raises(KernelUnavailable):
            cache.obtain(SOURCE, (), H200)
    assert not empty_cache.exists()
    assert cache.obtain(SOURCE, (), H200)


def test_threads_compile_a_program_once(monkeypatch, compilations):
    compile_source = compiler.compile_source

    def slowly(*args):
        time.sleep(0.05)
        return compile_source(*args)

    monkeypatch.setattr(compiler, "compile_source", slowly)
    images = []
    ask = lambda i: images.append(cache.obtain(SOURCE, (f"A={i % 2}",), H200))  # noqa: E731
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 2 and len(images) == 8 and len(set(images)) == 2


def test_an_entry_appears_whole(monkeypatch, compilations, empty_cache):
    """Nothing has the entry's name until all of it is in another file of the same folder."""
    replace, seen = os.replace, []

    def observed(temporary, path):
        image = f"{SOURCE} () sm_90".encode()
        assert not path.exists() and Path(temporary).parent == path.parent == empty_cache
        assert Path(temporary).read_bytes() == image + cache.MAGIC + hashlib.sha256(image).digest()
        replace(temporary, path)
        seen.append(path)

    monkeypatch.setattr(cache.os, "replace", observed)
    cache.obtain(SOURCE, (), H200)
    assert seen == list(empty_cache.iterdir())


WRITER = """
import logging, sys
from linrnn.kernels.cuda import cache, compiler
from linrnn.kernels.cuda.compiler import Source
from linrnn.kernels.cuda.once import Once
compiler.version, compiler.supported = lambda: (13, 0), lambda: (90,)
image = b"0123456789" * 20_000
compiler.compile_source = lambda *_: (image, "")
logging.basicConfig(level=logging.DEBUG)
sys.stdin.read(1)
for turn in range(100):
    cache._compiled = Once(cache._compile)
    if turn % 3 == int(sys.argv[1]) % 3:
        for _, path in cache.entries(cache.folder()):
            cache._remove(path)
    assert cache.obtain(Source("one.cu", "text", ()), (str(turn % 2),), (9, 0)) == image
"""


def test_processes_may_write_and_remove_at_the_same_time(empty_cache):
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(4)]
    for writer in writers:
        writer.stdin.write(b"g")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0 and b"damaged" not in errors, errors.decode()
    assert not list(empty_cache.glob("*.tmp"))


def test_the_least_recently_used_go_first(monkeypatch, empty_cache):
    monkeypatch.setattr(cache, "LIMIT", 4000)
    names = [f"one.sm_90.{i}.nvrtc13.0" for i in range(4)]
    empty_cache.mkdir()
    (empty_cache / "a note of mine").write_text("x" * 9000)
    (empty_cache / f"{names[0]}.abc.tmp").write_text("a writer that died")
    (empty_cache / f"{names[1]}.abc.tmp").write_text("a writer at work")
    for i, name in enumerate(names[:3]):
        assert cache.store(empty_cache, name, b"x" * 1000)
        os.utime(empty_cache / name, (1000 + i, 1000 + i))
    assert cache.load(empty_cache, names[0])  # the oldest, but used now
    os.utime(empty_cache / f"{names[0]}.abc.tmp", (1000, 1000))
    cache.store(empty_cache, names[3], b"x" * 1000)
    kept = {path.name for path in empty_cache.iterdir()}
    assert kept == {"a note of mine", f"{names[1]}.abc.tmp", names[0], names[2], names[3]}


def test_what_the_package_ships_comes_first(monkeypatch, compilations, tmp_path):
    for version, image in (((12, 9), b"twelve"), ((13, 0), b"thirteen"), ((13, 10), b"later")):
        cache.store(tmp_path / "prebuilt", cache.entry(SOURCE, (), "sm_90", version), image)
    assert cache.obtain(SOURCE, (), H200, (13, 0)) == b"later"
    assert cache.obtain(SOURCE, (), H200, (12, 4)) == b"twelve"  # no machine code of a later major version
    assert not compilations
    assert cache.obtain(SOURCE, (), H200, (11, 0)) and len(compilations) == 1
    assert cache.obtain(SOURCE, ("A=1",), H200, (13, 0)) and len(compilations) == 2


def test_a_filled_cache_needs_no_compiler(monkeypatch, compilations, empty_cache):
    image = cache.obtain(SOURCE, (), H200)
    monkeypatch.setattr(compiler, "version", no_compiler)
    assert cache.obtain(SOURCE, (), H200) == image
    with pytest.raises(KernelUnavailable, match="pip install one"):
        cache.obtain(SOURCE, ("A=1",), H200)
    with pytest.raises(KernelUnavailable, match="pip install one"):
        cache.obtain(SOURCE, (), H200, (12, 0))


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    (
        ("linux", {"LINRNN_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ("linux", {"LINRNN_CACHE_DIR": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/linrnn"),
        ("linux", {"HOME": "/home/me"}, "/home/me/.cache/linrnn"),
        ("win32", {"LOCALAPPDATA": "/local", "XDG_CACHE_HOME": "/xdg"}, "/local/linrnn"),
    ),
)
def test_where_the_cache_is(monkeypatch, platform, variables, expected):
    for name in ("LINRNN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", platform)
    assert cache.folder() == Path(expected)


def test_without_a_home_there_is_no_cache(monkeypatch, compilations):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LINRNN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache.folder() is None
    assert cache.obtain(SOURCE, (), H200) and len(compilations) == 1


def test_once_lets_different_keys_be_made_together():
    """Two makers that wait for each other; and an exception is not remembered."""
    meeting = threading.Barrier(2, timeout=10)
    pair: Once[int, int] = Once(lambda key: meeting.wait() * 0 + key)
    other = threading.Thread(target=lambda: pair[1])
    other.start()
    assert pair[2] == 2
    other.join()
    assert pair == {1: 1, 2: 2}
    attempts = iter((ValueError("first"), 5))

    def make(key):
        result = next(attempts)
        if isinstance(result, Exception):
            raise result
        return result

    once: Once[str, int] = Once(make)
    with pytest.raises(ValueError, match="first"):
        once["key"]
    assert once["key"] == once["key"] == 5


def test_the_command_line_compiles_ahead(monkeypatch, compilations, empty_cache, tmp_path, capsys):
    wanted = (("probe.cu", ()), ("probe.cu", ("A=1",)))
    monkeypatch.setattr(program_line, "programs", lambda: wanted)
    assert program_line.main(["--compile", "sm_90", "compute_80", "--out", str(tmp_path / "prebuilt")]) == 0
    shown = capsys.readouterr().out
    assert "[1/4]" in shown and "[4/4]" in shown and "compute_80 probe.cu A=1" in shown and " s " in shown
    assert len(compilations) == 4 and not empty_cache.exists()
    cache.obtain(compiler.read("probe.cu"), ("A=1",), H200, (13, 0))
    assert len(compilations) == 4
    assert program_line.main(["--compile", "sm_80"]) == 0 and len(list(empty_cache.iterdir())) == 2


def test_the_command_line_says_what_is_wrong(monkeypatch, compilations, empty_cache, capsys):
    monkeypatch.setattr(program_line, "programs", lambda: (("probe.cu", ()),))
    for arguments, message in (
        (["--compile", "sm_7"], "'sm_7' is not an architecture of this NVRTC; it knows sm_80, sm_90, compute_80"),
        (["--out", "x"], "name architectures with --compile"),
        (["--device", "-1"], "--device must be at least 0, got -1"),
    ):
        with pytest.raises(SystemExit):
            program_line.main(arguments)
        assert message in capsys.readouterr().err
    empty_cache.write_text("in the way")
    assert program_line.main(["--compile", "sm_90"]) == 1
    assert "cannot be written; choose another folder with --out" in capsys.readouterr().err
    monkeypatch.setattr(compiler, "compile_source", lambda *_: no_compiler())
    assert program_line.main(["--compile", "sm_90"]) == 1
    assert "pip install one" in capsys.readouterr().err
