"""load_pretrained against a hub on this machine: only data is asked for, and the cache serves without a network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from linrnn.models import LanguageModel
from linrnn.models.checkpoints import export_transformers

pytest.importorskip("huggingface_hub")
COMMIT = "a" * 40
LOAD = """
import sys, torch
from linrnn.models.checkpoints import load_pretrained
try:
    model = load_pretrained(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
except (OSError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(model(torch.arange(9)[None])[0].double().sum().item())
"""


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks of one repository, nobody/mamba; while `cut`, weights break off."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[str]
    cut = False

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if not path.removeprefix("/api/models").startswith("/nobody/mamba"):
            self.answer(404, b"{}", X_Error_Code="RepoNotFound", Content_Type="application/json")
        elif "/revision/" in path and name not in ("main", "v2", COMMIT):
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound", Content_Type="application/json")
        elif "/resolve/" in path and name in self.files:
            self.asked.append(name)
            content = self.files[name]
            start = int(self.headers["Range"].split("=")[1].split("-")[0]) if "Range" in self.headers else 0
            body, length = content[start:], str(len(content) - start)
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT}
            if start:
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if Hub.cut and name.endswith(".safetensors") and self.command == "GET":
                body, self.close_connection = body[:100], True
            self.answer(206 if start else 200, body, **headers, Content_Length=length)
        elif "/tree/" in path:
            files = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.files.items()]
            self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/nobody/mamba"):
            siblings = [{"rfilename": n} for n in self.files]
            info = {"id": "nobody/mamba", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound", Content_Type="application/json")

    do_HEAD = do_GET


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(20, mixer="mamba", d_model=16, n_layers=2, ffn=None).eval()


@pytest.fixture
def load(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    export_transformers(model, tmp_path / "saved", max_shard_bytes=5000)
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    strangers = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"again",
        "modeling.py": b"raise Exception",
    }
    monkeypatch.setattr(Hub, "files", files | strangers, raising=False)
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    monkeypatch.setattr(Hub, "cut", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
    }

    def run(*arguments: str, offline: bool = False) -> tuple[int, str, str]:
        """Loads in a process of its own: exit status, output, last line of its errors."""
        command = [sys.executable, "-c", LOAD, *arguments]
        ran = subprocess.run(
            command, env={**env, "HF_HUB_OFFLINE": str(int(offline))}, capture_output=True, text=True, timeout=300
        )
        return ran.returncode, ran.stdout.strip(), next(iter(ran.stderr.strip().splitlines()[-1:]), "")

    yield run
    server.shutdown()
    thread.join()
    server.server_close()


# processes that import torch, and the client's waits between its own retries
@pytest.mark.exhaustive
def test_a_hub(load: Callable[..., tuple[int, str, str]], model: LanguageModel) -> None:
    status, _, error = load("nobody/mamba", offline=True)
    assert status == 1 and error.startswith("ConnectionError: nobody/mamba: no such folder is here, the hub cannot be")
    Hub.cut = True
    status, _, error = load("nobody/mamba")
    assert status == 1 and error.startswith("ConnectionError: nobody/mamba at revision"), error
    Hub.cut = False
    status, output, error = load("nobody/mamba")
    assert status == 0, error
    with torch.no_grad():
        expected = model(torch.arange(9)[None])[0].double().sum().item()
    assert float(output) == pytest.approx(expected, abs=1e-4)
    needed = {name for name in Hub.files if name.startswith(("config", "model-", "model.safetensors"))}
    assert len(needed) > 3 and set(Hub.asked) == needed
    asked = len(Hub.asked)
    for arguments, offline in ((("nobody/mamba",), True), (("nobody/mamba", COMMIT), False)):
        assert load(*arguments, offline=offline)[:2] == (0, output)
    assert len(Hub.asked) == asked  # the cache has it all
    for arguments in (("nobody/else",), ("nobody/mamba", "v9")):
        status, _, error = load(*arguments)
        assert status == 1 and error.startswith("FileNotFoundError: nobody/"), error
        assert "neither a folder here nor on the hub" in error
