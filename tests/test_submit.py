"""Hand-over to Hugging Face Jobs, through huggingface_hub itself, against a
web server on this machine that answers as the Hub does."""
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from crowdlens import cli, submit
from crowdlens.core.files import InputError


class Hub(BaseHTTPRequestHandler):
    "What the Hub says to an upload and to a job."
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
def hub(monkeypatch):
    from huggingface_hub import HfApi
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.seen = dict(files={})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(submit, "HfApi", lambda token=None: HfApi(endpoint=url, token=token))
    monkeypatch.setattr(submit, "get_token", lambda: "hf_planted")
    yield server.seen
    server.shutdown()


@pytest.fixture
def crowds(tmp_path):
    top = tmp_path / "crowds"
    for p, text in (("data.yaml", "names: [person]"), ("train/labels/a.txt", "0 .5 .5 .1 .1\n"), (".cache/x", "x")):
        (top / p).parent.mkdir(parents=True, exist_ok=True)
        (top / p).write_text(text)
    return top


ARGS = ["submit", "03_detr_dinov3", "-f", "full", "--repo", "me/crowds", "-p", "space_id=me/board", "--name", "try"]


def test_data_and_job_arrive(hub, crowds, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([*ARGS, "-p", f"data={crowds}", "--data", str(crowds)])
    assert not e.value.code, capsys.readouterr()
    assert set(hub["files"]) == {"data.yaml", "train/labels/a.txt"}
    assert hub["repo"]["type"] == "dataset" and (hub["repo"].get("private") or hub["repo"].get("visibility") == "private")
    path, job, asked_as = hub["job"]
    assert path == "/api/jobs/me" and asked_as == "Bearer hf_planted"
    assert job["flavor"] == "a10g-large" and job["dockerImage"] == "python:3.11" and job["timeoutSeconds"] == 86400
    assert job["secrets"] == {"HF_TOKEN": "hf_planted"} and job["environment"]["CROWDLENS_PUSH_TO"] == "me/crowds-runs"
    assert job["volumes"] == [dict(type="dataset", source="me/crowds", mountPath="/data")]
    line = job["command"][2]
    assert "crowdlens run 03_detr_dinov3" in line and "data=/data" in line and "space_id=me/board" in line and "name=try" in line
    assert str(crowds) not in json.dumps(job) and "hf_planted" not in json.dumps({k: v for k, v in job.items() if k != "secrets"})
    assert "job: http" in capsys.readouterr().out


def test_what_the_job_runs_is_what_was_asked_for(crowds):
    "The command of the job, parsed by the same parser, gives the same settings."
    from test_guides import check

    from crowdlens import detr_dinov3 as stage
    from crowdlens.core import config, runs
    vals = runs.settings("03_detr_dinov3", stage.Config, "full", [f"data={crowds}", "ema=.999", "epochs=3"])
    for flavor in ("a10g-large", "a10g-largex4"):
        words = submit.request("03_detr_dinov3", stage.Config, vals, crowds, "me/crowds", flavor)["command"][2].split(" && ")[1]
        import shlex
        check(shlex.split(words))
        pairs = [w for a, w in zip(shlex.split(words), shlex.split(words)[1:]) if a == "-p"]
        back = runs.settings("03_detr_dinov3", stage.Config, "", pairs)
        assert back == vals | dict(data="/data")
    assert config.make(stage.Config, back).epochs == 3


def test_dry_run_asks_nobody_and_shows_no_secret(crowds, monkeypatch, capsys):
    def never(*a, **k): raise AssertionError("asked")
    monkeypatch.setattr(submit, "HfApi", never)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    with pytest.raises(SystemExit) as e:
        cli.main([*ARGS, "-p", f"data={crowds}", "--data", str(crowds), "--dry-run"])
    said = capsys.readouterr().out
    assert not e.value.code and "hf_planted" not in said and '"HF_TOKEN": "***"' in said and '"flavor": "a10g-large"' in said


def test_no_token_and_data_elsewhere_are_said(crowds, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "get_token", lambda: None)
    with pytest.raises(InputError, match="no token"):
        submit.submit({}, crowds, "me/crowds")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="not in the folder that is uploaded"):
        submit.there(str(tmp_path / "other"), crowds)


def test_a_refusal_of_the_hub_is_one_line(crowds, monkeypatch):
    class Down:
        def create_repo(self, *a, **k): raise ConnectionError("nobody answers\nand more")
    with pytest.raises(InputError, match="the Hub refused: ConnectionError: nobody answers"):
        submit.submit({}, crowds, "me/crowds", Down(), "hf_x")
