"""A download that breaks off, from a hub on this machine, is refused in one line, and the next one completes it."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "a" * 40
ROWS = {"train": 5000, "test": 7}
READ = """
import sys
from types import SimpleNamespace
from lra.tasks.sources import SourceError, read_source
task = SimpleNamespace(name="text", hub="nobody/reviews", folders=())
try:
    splits = read_source(task, None, {"text": "text", "label": "label"})
except SourceError as error:
    sys.exit(f"refused: {error}")
print({name: len(split) for name, split in splits.items()})
"""


def parquet(split: str) -> bytes:
    file = io.BytesIO()
    texts = [f"{split} {i} {hashlib.sha256(str(i).encode()).hexdigest()}" for i in range(ROWS[split])]
    pq.write_table(pa.table({"text": texts, "label": [i % 2 for i in range(ROWS[split])]}), file)
    return file.getvalue()


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks of a data set with two files; while `cut`, train.parquet breaks off after a while."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    cut = True

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if "/resolve/" in path and name in self.files:
            content = self.files[name]
            start = int(self.headers["Range"].split("=")[1].split("-")[0]) if "Range" in self.headers else 0
            body, length = content[start:], str(len(content) - start)
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": COMMIT}
            if start:
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if Hub.cut and name == "train.parquet" and self.command == "GET":
                body, self.close_connection = body[:1000], True
            self.answer(206 if start else 200, body, Content_Length=length, **headers)
        elif "/tree/" in path and not path.endswith("/data"):
            files = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.files.items()]
            self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        elif path.startswith("/api/datasets/nobody/reviews") and "/tree/" not in path:
            files = [{"rfilename": n} for n in self.files]
            info = {"id": "nobody/reviews", "sha": COMMIT, "siblings": files, "private": False, "tags": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound", Content_Type="application/json")

    do_HEAD = do_GET


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Hub, "files", {f"{split}.parquet": parquet(split) for split in ROWS}, raising=False)
    monkeypatch.setattr(Hub, "cut", True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


# the hub's client waits between its own retries
@pytest.mark.exhaustive
def test_a_broken_download_is_refused_and_then_completed(tmp_path, endpoint):
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }

    def run() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", READ], env=env, capture_output=True, text=True, timeout=120)

    ran = run()
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1 and last.startswith("refused: ") and "run again" in last and "nobody/reviews" in last
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".parquet", ".arrow")]
    assert not left
    Hub.cut = False
    ran = run()
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(ROWS)
