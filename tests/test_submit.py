"""Hand-over to Hugging Face Jobs, through huggingface_hub itself, against a
web server on this machine that answers as the Hub does."""
import json

import pytest

from crowdlens import cli, submit
from crowdlens.core.files import InputError


@pytest.fixture
def hub(hub, monkeypatch):
    from huggingface_hub import HfApi
    monkeypatch.setattr(submit, "HfApi", lambda token=None: HfApi(endpoint=hub["url"], token=token))
    monkeypatch.setattr(submit, "get_token", lambda: "hf_planted")
    return hub


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
