"""Stage 05: killed and resumed, bad input, real footage."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crowdlens import motrv2_embed as S
from crowdlens.core import runs
from crowdlens.core.det_db import from_mot, write_det_db
from crowdlens.core.files import InputError
from crowdlens.core.mot import read_mot
from crowdlens.core.runs import load_result
from crowdlens.models.motrv2 import SMALL, MOTRv2, once
from crowdlens.models.track_steps import detections
from crowdlens.core.frames import write_picture
from crowdlens.core.track_data import open_sequence

TOP = Path(__file__).resolve().parents[1]


def volleyball(shared, **kw):
    return S.Config(**dict(dict(data=str(shared / "realdata/mot_volleyball"), detector="dfine", teacher="truth",
                                calibration="labels", sampler_lengths=3, clip_limit=2, epochs=2, films=1), **kw))


@pytest.fixture(scope="module")
def done(shared, tmp_path_factory):
    "One run on two volleyball clips, shared by the tests below."
    out = tmp_path_factory.mktemp("done")
    return S.run(volleyball(shared, out=str(out), name="a"))


def test_volleyball_from_frames_to_films(done):
    m, top = done.metrics, done.folder
    assert (top / "report.html").stat().st_size > 20_000
    assert {"both", "calibrated", "original", "tuned"} <= {p.name for p in (top / "tracks").iterdir()}
    for way in ("original", "both"):
        assert 0 <= m[f"{way}/HOTA"] <= 1
    assert list((top / "films").glob("*.mp4"))
    assert m["tuned/norm"] > 0


def test_only_the_vector_changes(done):
    from safetensors.torch import load_file
    torch.manual_seed(0)
    small = runs.shipped("tracker")
    fresh = once(S.load(small) if small else MOTRv2(SMALL))
    new = load_file(done.folder / "checkpoints/last/model.safetensors")
    assert [k for k in new if not torch.equal(new[k], fresh[k])] == ["yolox_embed.weight"]
    published = torch.load(done.folder / "checkpoints/epoch-0002/checkpoint0001.pth", weights_only=True)["model"]
    assert torch.equal(published["yolox_embed.weight"], new["yolox_embed.weight"])


KILL = """
import os, signal, sys
from crowdlens import motrv2_embed as S
from crowdlens.models import motrv2_training as T
old, n = T.Tuner.learn, [0]
def learn(self, *a, **k):
    n[0] += 1
    if n[0] == 3: os.kill(os.getpid(), signal.SIGKILL)
    return old(self, *a, **k)
T.Tuner.learn = learn
S.run(S.Config(**eval(sys.argv[1])))
"""


def test_killed_in_mid_epoch_goes_on(done, shared, tmp_path):
    from dataclasses import asdict
    cfg = volleyball(shared, out=str(tmp_path), name="a", save_every=1)
    env = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
    got = subprocess.run([sys.executable, "-c", KILL, repr(asdict(cfg))], env=env, capture_output=True, text=True)
    assert got.returncode == -signal.SIGKILL, got.stderr[-2000:]
    res = S.run(cfg)
    same = {k: v for k, v in done.metrics.items()}
    assert res.metrics == same
    a, b = (torch.load(r.folder / "tuning/tuned.pt", weights_only=True) for r in (done, res))
    assert torch.equal(a["vector"], b["vector"]) and a["clips"] == b["clips"]
    for p in (done.folder / "tracks/both").iterdir():
        assert p.read_bytes() == (res.folder / "tracks/both" / p.name).read_bytes()


def test_tud_by_its_own_detections(shared, tmp_path):
    top = tmp_path / "TUD"
    src = shared / "realdata/mot_tud_stadtmitte/TUD-Stadtmitte"
    shutil.copytree(src, top)
    for p in sorted((top / "img1").iterdir())[14:]:
        p.unlink()
    for f in ("gt/gt.txt", "det/det.txt"):
        rows = [l for l in (top / f).read_text().splitlines() if l.strip() and int(l.split(",")[0]) <= 14]
        (top / f).write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match="outside 0..1"):
        S.run(S.Config(mode="evaluate", data=str(top), detector="det.txt", name="x"))
    res = S.run(S.Config(mode="evaluate", data=str(top), detector="det.txt", score_rule="rank", name="tud"))
    assert res.metrics["GT_Dets"] > 50
    assert (res.folder / "films/TUD.mp4").exists()


def test_mot17_predict_without_truth(shared, tmp_path):
    top = tmp_path / "set"
    shutil.copytree(shared / "realdata/mot17_mini", top)
    for d in top.glob("MOT17*"):
        shutil.rmtree(d / "gt")
    res = S.run(S.Config(mode="predict", data=str(top), detector="det.txt", name="p", films=0))
    assert "HOTA" not in res.metrics and res.metrics["original/boxes"] >= 0
    assert len(list((res.folder / "tracks/original").iterdir())) == 2


def test_det_db_with_a_hole_is_named(shared, tmp_path):
    src = shared / "realdata/mot17_mini"
    db = {}
    for n, k in (("MOT17-04-FRCNN", 8), ("MOT17-05-FRCNN", 6)):
        db |= from_mot(n, read_mot(src / n / "det/det.txt"), k)
    db.pop("MOT17-04-FRCNN/img1/00000003.txt")
    write_det_db(tmp_path / "db.json", db)
    with pytest.raises(InputError, match="00000003"):
        S.run(S.Config(mode="evaluate", data=str(src), det_db=str(tmp_path / "db.json"), name="h"))


def test_no_teacher_says_how_to_make_one(shared):
    with pytest.raises(InputError, match="det_db_yolox") as e:
        S.run(volleyball(shared, teacher="yolox", name="t"))
    assert "YOLOX-X" in e.value.fix and "teacher=detections" in e.value.fix


def test_too_few_frames_for_a_clip(shared):
    with pytest.raises(InputError, match="no clip of 30"):
        S.run(volleyball(shared, sampler_lengths=30, name="c"))


def test_nothing_detected_at_all(shared, tmp_path):
    src = shared / "realdata/mot17_mini/MOT17-05-FRCNN"
    write_det_db(tmp_path / "db.json", from_mot("MOT17-05-FRCNN", read_mot(src / "det/det.txt")[:0], 6))
    res = S.run(S.Config(mode="evaluate", data=str(src), det_db=str(tmp_path / "db.json"), name="n"))
    assert res.metrics["original/HOTA"] is not None


@pytest.mark.parametrize("style", ["yolox", "dfine", "shifted"])
def test_simulated_detectors_on_real_truth(shared, style):
    seq = open_sequence(shared / "realdata/mot_volleyball/volleyball_7_38025")
    db = detections(seq, style)
    s = np.concatenate([v[:, 4] for v in db.values()])
    assert len(db) == 20 and len(s) > 100
    assert s.max() <= dict(yolox=1, dfine=.67, shifted=.301)[style]


def pictures(top, sizes, first=1, skip=()):
    "A sequence of plain pictures, its frames of these (h, w)."
    for i, size in enumerate(sizes, first):
        if i not in skip:
            write_picture(top / f"img1/{i:08d}.jpg", np.full((*size, 3), 90, np.uint8))
    return top


@pytest.mark.parametrize("first,skip,why", [(1, (4,), "frame 4 is missing"), (0, (), "begin at 0"), (2, (), "missing")])
def test_frames_missing_in_the_middle_or_counted_otherwise(tmp_path, first, skip, why):
    pictures(tmp_path / "s", [(32, 48)] * 6, first, skip)
    with pytest.raises(InputError, match=why) as e:
        S.run(S.Config(mode="predict", data=str(tmp_path / "s"), detector="det.txt", name="f"))
    assert "img1" in str(e.value)


def test_frames_of_changing_size_strange_boxes_and_keys(tmp_path):
    "Followed and filmed; what lies outside of the picture, and the key of no frame, are named in the report."
    pictures(tmp_path / "s", [(96, 160)] * 3 + [(120, 200)] * 3)
    db = {f"s/img1/{i:08d}.txt": np.array([[10., 10, 20, 40, .9], [500, 10, 20, 40, .9]]) for i in range(1, 7)}
    db["s/img1/00000009.txt"] = np.empty((0, 5))
    write_det_db(tmp_path / "db.json", db)
    res = S.run(S.Config(mode="predict", data=str(tmp_path / "s"), det_db=str(tmp_path / "db.json"), name="f"))
    page, log = (res.folder / "report.html").read_text(), (res.folder / "log.txt").read_text()
    for text in (page, log):
        assert "keys without a picture" in text and "00000009" in text and "boxes outside the picture" in text
    assert (res.folder / "films/s.mp4").stat().st_size > 500


def test_frames_of_two_sizes_in_a_clip_are_refused(tmp_path):
    from crowdlens.models.motrv2_clips import Sequence
    from crowdlens.models.motrv2_training import ClipSet
    top = pictures(tmp_path / "s", [(96, 160)] * 3 + [(120, 200)] * 3)
    gt = {i: (np.array([[10., 10, 30, 50]]), np.array([1])) for i in range(1, 7)}
    seq = Sequence(sorted((top / "img1").iterdir()), {i: np.empty((0, 5)) for i in gt}, gt, "s")
    clips = ClipSet([seq], 5, 1, False, .12)
    with pytest.raises(InputError, match="differ in size"):
        for i in range(len(clips)):
            clips.clip(0, i)


def test_without_bytetrack_the_report_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    pictures(tmp_path / "s", [(96, 160)] * 4)
    write_det_db(tmp_path / "db.json", {f"s/img1/{i:08d}.txt": np.empty((0, 5)) for i in range(1, 5)})
    res = S.run(S.Config(mode="predict", data=str(tmp_path / "s"), det_db=str(tmp_path / "db.json"), name="n", films=0))
    assert "pip install --no-deps trackers" in (res.folder / "report.html").read_text()
    assert [p.name for p in (res.folder / "tracks").iterdir()] == ["original"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A small published file: random weights, their arguments beside them."
    import argparse
    torch.manual_seed(0)
    p = tmp_path_factory.mktemp("pth") / "checkpoint.pth"
    m = MOTRv2(SMALL)
    torch.nn.init.constant_(m.class_embed[-1].bias, .3)
    torch.save(dict(model=m.state_dict(), args=argparse.Namespace(lr=1), epoch=4), p)
    return p


def test_evaluate_and_predict_from_a_shell(small, tmp_path, capsys):
    from crowdlens import cli
    from crowdlens.core.world import World
    from crowdlens.core.worldfiles import write_world_film
    assert cli.kind_of(small) == "tracker"
    cli.app(["evaluate", "world", "-w", str(small), "-p", "test_sequences=1", "-p", "frames=6", "-p", "films=0",
             "--out", str(tmp_path)], standalone_mode=False)
    assert "HOTA" in capsys.readouterr().out
    res = load_result(tmp_path / S.STAGE / "evaluate")
    assert res.metrics["GT_Dets"] > 0 and res.metrics["original/HOTA"] is not None
    write_world_film(tmp_path / "film.mp4", World("court", seed=20_000, people=4, size=(320, 192), fps=10), 12)
    cli.app(["predict", str(tmp_path / "film.mp4"), "-w", str(small), "-p", "actions=none", "--out", str(tmp_path)],
            standalone_mode=False)
    top = tmp_path / "07_who_does_what/predict"
    assert {r.split(",")[0] for r in (top / "tracks.txt").read_text().splitlines()} <= {str(i) for i in range(1, 13)}
