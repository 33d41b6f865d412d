"""Shared fixtures: the folder of golden figures and real data, and a rule
that turns its absence into a visible skip and a skip in its presence into a
failure."""
import base64
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("CROWDLENS_SHARED", HERE.parents[1] / "shared"))


@pytest.fixture(scope="session")
def shared():
    "The folder with golden/ and realdata/; the test skips where it is absent."
    if not (SHARED / "realdata").is_dir():
        pytest.skip(f"no {SHARED}: real data and golden figures are absent")
    return SHARED


@pytest.fixture(autouse=True)
def _fresh_out(tmp_path, monkeypatch):
    "Every test writes its runs into a folder of its own."
    monkeypatch.setenv("CROWDLENS_OUT", str(tmp_path / "out"))


@pytest.fixture
def trackio_dir(tmp_path, monkeypatch):
    "Trackio writes into this folder."
    import trackio.sqlite_storage as ts
    import trackio.utils as tu

    folder = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    for m in (ts, tu):
        if hasattr(m, "TRACKIO_DIR"):
            monkeypatch.setattr(m, "TRACKIO_DIR", folder)
    return folder


class _Hub(BaseHTTPRequestHandler):
    "What the Hub says to an upload and to a job; the server keeps what it was sent."
    def log_message(self, *a): pass

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path.endswith("whoami-v2"):
            return self.answer(dict(name="me", type="user"))
        self.answer(dict(sha="0" * 40, id="me/crowds", siblings=[], private=True))

    def body(self):
        n = self.headers.get("Content-Length")
        if n is not None:
            return self.rfile.read(int(n))
        raw = b""
        while size := int(self.rfile.readline(), 16):
            raw += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return raw

    def do_POST(self):
        raw, seen = self.body(), self.server.seen
        if "/api/jobs/" in self.path:
            seen["job"] = self.path, json.loads(raw), self.headers["Authorization"]
            return self.answer(dict(id="1", createdAt="2026-11-21T12:00:00.000Z", owner=dict(id="1", name="me", type="user"),
                                    status=dict(stage="RUNNING", message=None), flavor="a10g-large", environment={},
                                    command=[], arguments=[], dockerImage="python:3.11", spaceId=None))
        if self.path.endswith("/repos/create"):
            seen["repo"] = json.loads(raw)
            return self.answer(dict(url="https://huggingface.co/datasets/me/crowds", name="me/crowds"))
        if "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(raw)["files"]]
            return self.answer(dict(files=[dict(path=p, uploadMode="regular", shouldIgnore=False) for p in names]))
        if "/commit/" in self.path:
            for line in raw.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    seen["files"][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            return self.answer(dict(commitUrl="https://huggingface.co/datasets/me/crowds/commit/1", commitOid="1" * 40, success=True))
        self.answer(dict())


@pytest.fixture
def hub():
    "A web server on this machine that answers as the Hub does: its url, and what it was sent (repo, files, job)."
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    server.seen = dict(files={}, url=f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.seen
    server.shutdown()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    uses_shared = "shared" in getattr(item, "fixturenames", ())
    if report.skipped and uses_shared and (SHARED / "realdata").is_dir():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped although {SHARED} is there"
