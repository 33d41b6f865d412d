"""Killed in the middle of inference, and a disk that fills up: stages 04 to 07
start again and end in the files of a run that was left alone."""
import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crowdlens.core import files
from crowdlens.core.files import InputError
from crowdlens.core.frames import write_film
from crowdlens.core.mot import mot_rows, save_mot
from crowdlens.core.world import World

TOP = Path(__file__).resolve().parents[1]

# starts a stage in forks of one process: whole, killed at each place in turn, and once more
DRIVER = """
import importlib, json, os, signal, sys, traceback
import torch
torch.set_num_threads(1)
spec = json.loads(sys.argv[1])
stage = importlib.import_module("crowdlens." + spec["stage"])
def dying(it, n):
    for k, x in enumerate(it):
        if k == n: os.kill(os.getpid(), signal.SIGKILL)
        yield x
def calls(owner, name, n):
    "The n-th call of `owner.name` kills."
    old, left = getattr(owner, name), [n]
    def new(*a, **k):
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        return old(*a, **k)
    setattr(owner, name, new)
def yields(owner, name, n):
    "What `owner.name` yields ends after n."
    old = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: dying(old(*a, **k), n))
def start(out, place=None):
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if place:
            how, where, name, n = place
            where, *inner = where.split(":")
            owner = importlib.import_module("crowdlens." + where)
            for k in inner: owner = getattr(owner, k)
            dict(calls=calls, yields=yields)[how](owner, name, n)
        stage.run(stage.Config(**spec["config"], out=spec["top"] + "/" + out, name="a"))
        os._exit(0)
    except BaseException:
        traceback.print_exc(); os._exit(1)
codes = [start("whole")]
for p in spec["places"]:
    if codes[-1] in (0, -9): codes.append(start("killed", p))
print(json.dumps(codes + [start("killed")]))
"""
RECORDS = {"config.json", "log.txt", "report.html", "result.json", ".lock"}  # hold times


def same_files(a, b):
    "Every file of one run is one of the other, byte for byte; nothing lies about."
    x, y = ({p.relative_to(f).as_posix(): p for p in f.rglob("*") if p.is_file() and p.name not in RECORDS}
            for f in (a, b))
    assert sorted(x) == sorted(y)
    differ = [k for k in x if x[k].read_bytes() != y[k].read_bytes()]
    assert not differ, differ
    return sorted(x)


def drill(top, stage, config, places):
    "Folders of the whole and of the killed run, after every place did kill."
    spec = dict(stage=stage, config=config, top=str(top), places=places)
    got = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(spec)], capture_output=True, text=True, cwd=TOP)
    assert got.returncode == 0, got.stderr[-3000:]
    codes = json.loads(got.stdout.splitlines()[-1])
    assert codes == [0, *[-9] * len(places), 0], (codes, got.stderr[-3000:])
    return (next((top / k).glob("*/a")) for k in ("whole", "killed"))


@pytest.fixture(scope="module")
def court(tmp_path_factory):
    "Two seconds of a small court as a film, and its true tracks."
    top = tmp_path_factory.mktemp("court")
    w, ims, rows = World("court", 20_003, 4, (320, 192), 10), [], []
    for im, t in w.frames(21):
        ims.append(im)
        rows += [(t.index, i + 1, *b) for i, b in zip(t.ids, t.boxes_xyxy)]
    r = np.array(rows)
    write_film(top / "match.mp4", ims, 10)
    save_mot(top / "match.txt", mot_rows(r[:, 0], r[:, 1], np.c_[r[:, 2:4], r[:, 4:] - r[:, 2:4]]))
    return top


def tracker():
    return "" if (TOP / "data/tiny/tracker/crowdlens.json").is_file() else "bytetrack"


def test_07_killed_at_every_step(court, tmp_path):
    a, b = drill(tmp_path, "who_does_what", dict(source=str(court / "match.mp4"), tracker=tracker()), [
        ("calls", "models.detector:Detector", "detect", 4), ("yields", "models.film_steps", "persons", 9),
        ("yields", "models.film_steps", "name_actions", 0), ("calls", "who_does_what:pq:ParquetWriter", "write_table", 1),
        ("yields", "who_does_what", "annotated", 12)])
    made = same_files(a, b)
    assert {"detections.json", "tracks.txt", "actions.csv", "who_does_what.parquet", "annotated.mp4"} <= set(made)
    assert len((a / "detections.jsonl").read_text().splitlines()) == 21


def test_05_killed_while_tracking_a_film(court, tmp_path):
    a, b = drill(tmp_path, "motrv2_embed", dict(mode="predict", data=str(court / "match.mp4"), detector="data/tiny/court"), [
        ("calls", "core.track_data", "write_picture", 9), ("calls", "models.detector:Detector", "detect", 2),
        ("yields", "models.motrv2:MOTRv2", "track", 12), ("yields", "metrics.track_plots", "tracked_frames", 12)])
    made = same_files(a, b)
    assert {"tracks/original/match.txt", "films/match.mp4", "frames/match/img1/00000021.jpg"} <= set(made)


def test_06_killed_while_a_film_is_looked_at(court, tmp_path):
    a, b = drill(tmp_path, "slowfast_finetune", dict(mode="predict", data=str(court / "match.mp4"), weights="tiny",
        boxes=str(court / "match.txt"), box_thr=0.), [("yields", "slowfast_finetune", "stream", 2)])
    assert {"result.csv", "who_does_what.csv"} <= set(same_files(a, b))
    assert (a / "result.csv").read_text().count("\n") > 10


def one_thread():
    "Bits depend on the number of threads."
    import torch
    torch.set_num_threads(1)


class Full:
    "The disk is full once: when a file of this name is written."
    def __init__(self, name):
        self.name, self.hit, self.real = name, [], files._sync

    def __call__(self, path):
        name = re.sub(r"^\.(.*)\.part-\w{8}(\.[^.]*)?$", r"\1", Path(path).name)
        if not self.hit and re.fullmatch(self.name, name):
            self.hit.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(path)


def fills_up(monkeypatch, run, folder, names):
    "Each start finds no room for one more file; the last one ends, and files that were there are its own."
    from crowdlens.core import runs
    kept = []
    for name in names:
        full = Full(name)
        with monkeypatch.context() as m, pytest.raises(InputError, match="no room on the disk"):
            m.setattr(files, "_sync", full)
            m.setattr(runs, "_sync", full)
            run()
        assert full.hit, name
        left = [p for p in folder.rglob(".*") if "part" in p.name]
        assert not left and not (folder / "metrics.json").exists()
        kept += [(p, p.read_bytes()) for p in folder.rglob("*") if p.is_file() and p.name == full.hit[0]]
    res = run()
    assert [p for p, raw in kept if p.name not in RECORDS and p.read_bytes() != raw] == []
    return res


def test_04_on_a_full_disk(tmp_path, monkeypatch):
    from crowdlens import dfine_fisheye as stage
    from test_dfine_training import coco, config
    one_thread()
    path = coco(tmp_path, n=4)

    def run(name, **kw):
        return stage.run(config(path, name=name, out=str(tmp_path), epochs=1, stop_epoch=0, **kw))
    whole = run("whole")
    got = fills_up(monkeypatch, lambda: run("full"), tmp_path / stage.STAGE / "full",
                   [r"config\.json", r"model\.safetensors", r"report\.html"])
    assert got.metrics == whole.metrics
    look = dict(mode="predict", model=str(got.folder / "checkpoints/last"), size=0, submission=True)
    path = tmp_path / "set"
    a, folder = run("seen", **look), tmp_path / stage.STAGE / "partly"
    b = fills_up(monkeypatch, lambda: run("partly", **look), folder, [r"results\.json", r"submission\.json"])
    assert same_files(a.folder, b.folder)


def test_05_on_a_full_disk(tmp_path, monkeypatch):
    from crowdlens import motrv2_embed as stage
    from crowdlens.core.worldfiles import write_mot
    write_mot(tmp_path / "set/court", World("court", 20_003, 4, (160, 96), 10), 12)
    cfg = dict(data=str(tmp_path / "set"), detector="yolox", teacher="truth", calibration="labels", sampler_lengths=2,
               sample_interval=2, clip_limit=2, epochs=1, threads=1)
    whole = stage.run(stage.Config(**cfg, out=str(tmp_path), name="whole"))
    got = fills_up(monkeypatch, lambda: stage.run(stage.Config(**cfg, out=str(tmp_path), name="full")),
                   tmp_path / stage.STAGE / "full",
                   [r"main_test\.json", r"tuned\.pt", r"model\.safetensors", r"court\.txt", r"court\.mp4"])
    assert got.metrics == whole.metrics
    for way in ("original", "tuned"):
        a, b = ((r.folder / f"tracks/{way}/court.txt").read_bytes() for r in (whole, got))
        assert a == b


def test_06_on_a_full_disk(court, tmp_path, monkeypatch):
    from crowdlens import slowfast_finetune as stage
    from test_actions_stage import SMALL
    one_thread()

    def run(name, **kw):
        return stage.run(stage.Config(**kw, out=str(tmp_path), name=name))
    cfg = SMALL | dict(max_iter=2, world_movies=1, world_seconds=4)
    whole = run("whole", **cfg)
    got = fills_up(monkeypatch, lambda: run("full", **cfg), tmp_path / stage.STAGE / "full",
                   [r"data_check\.json", r"model\.safetensors", r"result\.csv"])
    assert got.metrics == whole.metrics
    film = dict(mode="predict", data=str(court / "match.mp4"), weights="tiny", boxes=str(court / "match.txt"), box_thr=0.)
    a = run("seen", **film)
    b = fills_up(monkeypatch, lambda: run("partly", **film), tmp_path / stage.STAGE / "partly",
                 [r"result\.csv", r"who_does_what\.csv"])
    assert same_files(a.folder, b.folder)


LIMIT = """
import resource, signal, sys, torch
from crowdlens.core import config, runs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
w, s = (torch.zeros(n) for n in ((90_000, 10) if sys.argv[2] == "weights" else (10, 90_000)))
try:
    with runs.Run("00_toy", config.Config(out=sys.argv[1], name="a")) as r:
        r.save("epoch-0001", {"w": w}, dict(kind="toy"), dict(x=s))
except runs.InputError as e:
    print(e); sys.exit(2)
"""


@pytest.mark.parametrize("which", ["weights", "state"])
def test_a_disk_that_is_full_for_a_library(which, tmp_path):
    "A limit on the file's size stands for it; safetensors and torch say so in words of their own."
    got = subprocess.run([sys.executable, "-c", LIMIT, str(tmp_path), which], capture_output=True, text=True, cwd=TOP)
    assert got.returncode == 2 and "no room on the disk" in got.stdout, got.stdout + got.stderr[-2000:]
    assert not list((tmp_path / "00_toy/a/checkpoints").iterdir())
