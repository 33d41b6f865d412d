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
from crowdlens.core.det_db import from_mot, write_det_db
from crowdlens.core.files import InputError
from crowdlens.core.mot import read_mot
from crowdlens.core.runs import load_result
from crowdlens.models.motrv2 import SMALL, MOTRv2, once
from crowdlens.models.track_steps import detections
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
    fresh = once(MOTRv2(SMALL)) if not (S.shipped() / "crowdlens.json").exists() else once(S.load(S.shipped()))
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
