"""Faults that a run must survive: kills at three places, a full disk, a
second process, a planted token."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crowdlens.core import runs
from crowdlens.core.config import Config
from crowdlens.core.files import InputError, atomic, read_json
from crowdlens.core.report import Report

TOY = Path(__file__).with_name("toy_training.py")


def toy(out, epochs=3, kill="", **env):
    env = os.environ | {"KILL": kill, **env}
    return subprocess.run([sys.executable, TOY, out, str(epochs)], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The run that nothing happened to."
    out = tmp_path_factory.mktemp("whole")
    assert toy(out).returncode == 0
    return out / "00_toy" / "t"


def same(a, b):
    "Weights, optimiser, random states and figures are equal to the bit."
    la, lb = a / "checkpoints" / "last", b / "checkpoints" / "last"
    wa, wb = load_file(la / "model.safetensors"), load_file(lb / "model.safetensors")
    assert wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    sa, sb = (torch.load(p / "state.pt", weights_only=True) for p in (la, lb))
    assert flat(sa) == flat(sb)
    assert read_json(a / "metrics.json") == read_json(b / "metrics.json")
    assert runs.history(a) == runs.history(b)


def flat(o):
    "Nested values as comparable ones."
    if isinstance(o, dict):
        return {k: flat(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)):
        return [flat(v) for v in o]
    return o.tolist() if torch.is_tensor(o) else o


@pytest.mark.parametrize("where", ["before", "mid", "write"])
def test_killed_run_equals_whole(where, whole, tmp_path):
    assert toy(tmp_path, kill=where).returncode == -signal.SIGKILL
    folder = tmp_path / "00_toy" / "t"
    assert not (folder / "metrics.json").exists()
    assert toy(tmp_path).returncode == 0
    same(whole, folder)


def test_full_disk_keeps_last_good(whole, tmp_path):
    got = toy(tmp_path, kill="full")
    assert got.returncode == 2 and "no room on the disk" in got.stderr
    top = tmp_path / "00_toy" / "t" / "checkpoints"
    assert (top / "last").resolve().name == "epoch-0001"
    assert sorted(p.name for p in top.iterdir()) == ["best", "epoch-0001", "last"]
    assert toy(tmp_path).returncode == 0
    same(whole, tmp_path / "00_toy" / "t")


def test_raised_schedule_goes_on(whole, tmp_path):
    assert toy(tmp_path, epochs=2).returncode == 0
    assert toy(tmp_path, epochs=3).returncode == 0
    same(whole, tmp_path / "00_toy" / "t")
    log = (tmp_path / "00_toy" / "t" / "log.txt").read_text()
    assert "epochs from 2 to 3" in log and "resumes after epoch-0002" in log


def test_only_rank_0_writes(tmp_path):
    got = toy(tmp_path, RANK="1")
    assert got.returncode == 0 and got.stdout.startswith("{'loss'"), got.stderr
    assert not (tmp_path / "00_toy").exists()


def test_killed_process_frees_its_lock(tmp_path):
    code = (
        "import sys, time; from crowdlens.core.runs import *; from crowdlens.core.config import Config\n"
        "with Run('00_toy', Config(out=sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    p = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    while p.stdout.readline().strip() != "in":
        assert p.poll() is None
    cfg = Config(out=str(tmp_path))
    with pytest.raises(InputError, match="another process"):
        runs.Run("00_toy", cfg).__enter__()
    p.kill()
    p.wait()
    for _ in range(50):
        try:
            with runs.Run("00_toy", cfg):
                return
        except InputError:
            time.sleep(0.1)
    raise AssertionError("the lock outlived the process that held it")


def test_no_token_reaches_the_folder(tmp_path, monkeypatch):
    token = "hf_" + "planted" * 5
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, token)
    with runs.Run("00_toy", Config(out=str(tmp_path))) as run:
        run.log("working")
        run.finish(dict(n=1), Report("t"))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 4
    assert not [p for p in files if token.encode() in p.read_bytes()]


def test_a_failing_run_says_why_in_its_log(tmp_path):
    with pytest.raises(ZeroDivisionError), runs.Run("00_toy", Config(out=str(tmp_path))) as run:
        1 / 0
    log = (run.folder / "log.txt").read_text()
    assert "ZeroDivisionError" in log and "test_runs.py" in log


def test_unwritable_folder_is_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write here"):
        runs.Run("00_toy", Config(out=str(tmp_path / "file"))).__enter__()


def test_atomic_under_a_size_limit(tmp_path):
    "The real thing: the kernel refuses to let the file grow."
    (tmp_path / "a.txt").write_text("old")
    code = (
        "import resource, signal, sys; from crowdlens.core.files import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with atomic(sys.argv[1]) as p: p.write_bytes(b'x' * 5000)"
    )
    got = subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], capture_output=True, text=True)
    assert got.returncode == 1 and "File too large" in got.stderr
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_report_escapes_names(tmp_path):
    evil = '<script>alert("x")</script>.jpg'
    r = Report(evil, evil).heading(evil).say(evil).cards({evil: evil}).table([{evil: evil}]).link(evil, evil)
    assert "<script" not in r.html()
