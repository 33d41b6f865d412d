"""Fisheye data and inference where a notebook should not show it: real data,
processes, kills, bad input."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdlens.core import detection_outputs as outputs
from crowdlens.core import fisheye_challenge as challenge
from crowdlens.core import fisheye_warp as fw
from crowdlens.core import pseudo_labels as pl
from crowdlens.core.coco import LabelMap, read_coco
from crowdlens.core.files import InputError, read_json, write_json
from crowdlens.core.fisheye_augment import Changes, augment
from crowdlens.core.frames import write_picture
from crowdlens.core.images import read_image
from crowdlens.core.lens import reproject, roll

ROOT = Path(__file__).resolve().parents[1]


def toy_set(top, n=3, side=96):
    "A folder of pictures with a rare bus and many cars, and its JSON."
    rng = np.random.default_rng(0)
    ims, anns = [], []
    for k in range(1, n + 1):
        im = rng.integers(0, 255, (side, side, 3), np.uint8) // 4
        for j in range(4):
            x, y = rng.integers(4, side - 36, 2)
            w = 28
            im[y : y + w, x : x + w] = rng.integers(100, 255, 3)
            anns.append(dict(id=len(anns) + 1, image_id=k, category_id=0 if (k, j) == (1, 0) else 2,
                             bbox=[int(x), int(y), w, w]))
        write_picture(top / "in" / f"camera1_A_{k}.jpg", im)
        ims.append(dict(id=k, file_name=f"camera1_A_{k}.jpg", width=side, height=side))
    write_json(top / "in.json", dict(images=ims, annotations=anns, categories=[
        dict(id=0, name="Bus"), dict(id=2, name="Car")]))
    return top / "in", top / "in.json"


def files_of(folder):
    "Name -> bytes of everything but the records of a run."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*"))
            if p.is_file() and p.name != "augment.json"}


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.floats(0, .3), st.floats(-.02, .08), st.floats(.8, 1.2))
def test_warp_and_back_returns_the_points(turn, lean, k1, zoom):
    src = fw.guess_fisheye((400, 400))
    dst = fw.tilt(roll(fw.relens(src, zoom, k1), turn), lean, 1.)
    uv = np.random.default_rng(0).uniform(60, 340, (20, 2))
    assert np.allclose(reproject(reproject(uv, src, dst), dst, src), uv, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 380)] * 2, *[st.floats(5, 150)] * 2), max_size=6), st.floats(-3, 3))
def test_warped_boxes_stay_in_the_frame_and_hold_their_middle(rows, turn):
    b = np.array([(x, y, min(x + w, 400), min(y + h, 400)) for x, y, w, h in rows], float).reshape(-1, 4)
    src = fw.guess_fisheye((400, 400))
    dst = roll(src, turn)
    got, seen = fw.warp_boxes(b, src, dst)
    assert ((seen >= 0) & (seen <= 1 + 1e-9)).all()
    ok = np.isfinite(got).all(1)
    assert (got[ok] >= -1e-6).all() and (got[ok] <= 400 + 1e-6).all()
    mid = reproject((b[:, :2] + b[:, 2:]) / 2, src, dst)
    whole = ok & (seen > .999)
    assert ((mid[whole] >= got[whole, :2] - 1e-6) & (mid[whole] <= got[whole, 2:] + 1e-6)).all()


def test_cut_outline_against_brute_force():
    "The box of a cut polygon against the polygon painted on a fine grid."
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(3)
    for _ in range(30):
        a = np.sort(rng.uniform(0, 2 * np.pi, 12))
        p = rng.uniform(-20, 120, 2) + np.stack([np.cos(a), np.sin(a)], 1) * rng.uniform(10, 60)
        box, seen = fw.frame_outlines(p[None], 100., 100.)
        big = np.zeros((1000, 1000), np.uint8)
        cv2.fillPoly(big, [(p * 10).round().astype(np.int32)], 1)
        y, x = np.nonzero(big)
        if len(x) < 200:
            continue
        want = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 10
        assert np.allclose(box[0], want, atol=.4), (box, want)  # painted in tenths; thin tips lose three


def test_augmenting_in_processes_and_after_a_kill_gives_the_same_files(tmp_path):
    images, src = toy_set(tmp_path, 4)
    args = dict(n=2, seed=3, validation=3, changes=Changes(paste=1, move=1))
    a = augment(images, src, tmp_path / "a", **args)
    assert a["images"] == 12 and a["skipped"] == []
    read_coco(a["annotations_json"])
    b = augment(images, src, tmp_path / "b", workers=2, **args)
    assert b["annotations"] == a["annotations"]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    code = ("import os, sys; from crowdlens.core import fisheye_augment as m; from crowdlens.core.fisheye_augment import *\n"
            "work, n = m._work, []\n"
            "def once(i):\n"
            "    n.append(i)\n"
            "    if len(n) == 3: os.kill(os.getpid(), 9)\n"
            "    work(i)\n"
            "m._work = once\n"
            f"augment({str(images)!r}, {str(src)!r}, {str(tmp_path / 'c')!r}, n=2, seed=3, validation=3,"
            " changes=Changes(paste=1, move=1))\n")
    r = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert not (tmp_path / "c" / "annotations.json").exists()
    augment(images, src, tmp_path / "c", **args)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c")
    d = augment(images, src, tmp_path / "d", **args | dict(seed=4))
    assert files_of(tmp_path / "a") != files_of(tmp_path / "d") and d["images"] == 12


def test_augmenting_bad_input(tmp_path):
    images, src = toy_set(tmp_path)
    doc = read_json(src)
    (images / "camera1_A_2.jpg").write_bytes(b"broken")
    got = augment(images, src, tmp_path / "o", n=1)
    assert got["images"] == 4 and len(got["skipped"]) == 1 and "camera1_A_2" in got["skipped"][0]

    def bad(match, **change):
        d = json.loads(json.dumps(doc)) | change
        write_json(tmp_path / "bad.json", d)
        with pytest.raises(InputError, match=match):
            augment(images, tmp_path / "bad.json", tmp_path / "bad", n=1)
        assert not (tmp_path / "bad" / "annotations.json").exists()

    ann, im = doc["annotations"], doc["images"]
    bad("no 'width'", images=[{k: v for k, v in im[0].items() if k != "width"}])
    bad("twice", images=im + im[:1])
    bad("not in images", annotations=[dict(ann[0], image_id=77)])
    bad("not in categories", annotations=[dict(ann[0], category_id=9)])
    bad("no 'bbox'", annotations=[dict(id=1, image_id=1, category_id=0, segmentation=[[1, 1, 2, 2, 3, 1]])])
    bad("bbox", annotations=[dict(ann[0], bbox=[1, 2, float("nan"), 3])])
    bad("not one picture", images=[dict(im[1])], annotations=[])
    with pytest.raises(InputError, match="leaves|outside"):
        write_json(tmp_path / "out.json", doc | dict(images=[dict(im[0], file_name="../../etc/passwd")],
                                                     annotations=[]))
        augment(images, tmp_path / "out.json", tmp_path / "x", n=1)


def test_original_size_that_differs_from_the_file_is_listed(tmp_path):
    images, src = toy_set(tmp_path)
    doc = read_json(src)
    doc["images"][0]["width"] = 50
    write_json(src, doc)
    got = augment(images, src, tmp_path / "o", n=1)
    assert "stated are 50x96" in got["skipped"][0]


def test_real_fisheye_data(shared, tmp_path):
    "FishEye8K's pictures: augmented, looked at, handed in and checked."
    top = shared / "realdata" / "fisheye8k"
    doc = read_coco(top / "coco.json")
    got = augment(top / "images", top / "coco.json", tmp_path / "aug", n=2, validation=4)
    new = read_coco(got["annotations_json"])
    assert got["images"] == 3 * len(doc["images"]) and not got["skipped"]
    size = {m["id"]: (m["width"], m["height"]) for m in new["images"]}
    for a in new["annotations"]:
        x, y, w, h = a["bbox"]
        W, H = size[a["image_id"]]
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= W + .01 and y + h <= H + .01
    assert got["annotations"] > 2 * len(doc["annotations"])
    for m in new["images"]:
        assert read_image(Path(got["images_dir"]) / m["file_name"]).shape[1::-1] == size[m["id"]]
    results = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=.9)
               for a in doc["annotations"]]
    sub = outputs.to_submission(doc["images"], results, doc["categories"], path=tmp_path / "s.json")
    assert len(sub) == len(results)
    ids = {challenge.image_id(m["file_name"]) for m in doc["images"]}
    assert challenge.validate(read_json(tmp_path / "s.json"), ids)["boxes"] == len(results)


def test_pseudo_label_precision_on_known_boxes(shared, tmp_path):
    doc = read_coco(shared / "realdata" / "fisheye8k" / "coco.json")
    rng = np.random.default_rng(0)

    def model(noise):
        out = []
        for a in doc["annotations"]:
            if rng.random() < .85:
                out.append(dict(image_id=a["image_id"], category_id=a["category_id"], score=float(rng.uniform(.5, 1)),
                                bbox=(np.array(a["bbox"]) + rng.normal(0, noise, 4)).tolist()))
            if rng.random() < .3:
                out.append(dict(image_id=a["image_id"], category_id=a["category_id"], score=float(rng.uniform(.2, .6)),
                                bbox=[float(v) for v in (*rng.uniform(0, 900, 2), 30, 30)]))
        return out

    got = pl.label_set(dict(a=model(.4), b=model(.4), c=model(.4)), tmp_path / "p", images=doc, gt=doc,
                       pictures=shared / "realdata" / "fisheye8k" / "images", thresholds=.3)
    rows = {r["threshold"]: r for r in got["table"] if r["class"] == "all"}
    assert rows[.5]["precision"] > rows[.1]["precision"] + .1
    assert got["review"] == len(doc["images"])
    merged = pl.merge_labels(doc, tmp_path / "p" / "pseudo.json")
    read_coco(merged)
    assert len(merged["annotations"]) >= len(doc["annotations"])


def test_results_that_make_no_sense():
    ims = [dict(id=1, file_name="camera1_A_1.png", width=10, height=10)]
    base = dict(images=ims, categories=[dict(id=0, name="Bus")])

    def bad(match, **row):
        r = dict(image_id=1, category_id=0, bbox=[0, 0, 2, 2], score=.5) | row
        with pytest.raises(InputError, match=match):
            pl.read_predictions([r], base)

    bad("image 5", image_id=5)
    bad("category 3", category_id=3)
    bad("score", score=float("nan"))
    bad("score", score=1.5)
    bad("bbox", bbox=[1, 2, 3])
    bad("bbox", bbox=[1, 2, float("inf"), 3])


def test_submission_ids_that_collide():
    ims = [dict(id=1, file_name="camera10_A_2.png"), dict(id=2, file_name="camera1_M_12.png")]
    with pytest.raises(InputError, match="have the id 1012"):
        outputs.to_submission(ims, [], [dict(id=0, name="Bus")])


class Half:
    "A detector that finds the left half of each picture."
    labels = LabelMap.make(["person"])

    def __init__(self, stop=0):
        self.asked, self.stop = 0, stop

    def detect(self, images, batch=8, threshold=0., top=300):
        self.asked += len(images)
        if self.stop and self.asked > self.stop:
            raise KeyboardInterrupt
        return [(np.array([[0, 0, im.shape[1] / 2, im.shape[0]]]), np.array([.9]), np.array([0])) for im in images]


def test_stopped_inference_ends_in_the_same_files(tmp_path):
    from crowdlens.core.frames import write_film
    from crowdlens.models.detect_files import predict
    images, _ = toy_set(tmp_path, 5)
    write_film(tmp_path / "f.mp4", [np.full((32, 48, 3), 20 * k, np.uint8) for k in range(9)], 5)
    for src in (images, tmp_path / "f.mp4"):
        a, b = tmp_path / f"a{src.name}", tmp_path / f"b{src.name}"
        predict(Half(), src, a, batch=2)
        with pytest.raises(KeyboardInterrupt):
            predict(Half(stop=3), src, b, batch=2)
        assert not (b / "results.json").exists()
        d = Half()
        predict(d, src, b, batch=2)
        assert 0 < d.asked < 9
        assert files_of(a) == files_of(b)


def test_each_image_once_over_processes(tmp_path):
    "Three processes share a folder; every picture is looked at once."
    images, _ = toy_set(tmp_path, 7)
    (images / "broken.jpg").write_bytes(b"x")
    code = ("import sys, warnings; sys.path.insert(0, 'tests')\n"
            "warnings.simplefilter('ignore')\n"
            "import crowdlens.models.detect_files as m\n"
            "from test_fisheye import Half\n"
            "from pathlib import Path\n"
            "m._meet = lambda: None\n"
            f"d = Half(); m.detect_files(d, m.pictures_of({str(images)!r}), {str(tmp_path / 'o')!r}, 2)\n"
            "print(d.asked)\n")
    asked = []
    for r in range(3):
        p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env=dict(os.environ, RANK=str(r), WORLD_SIZE="3"))
        assert p.returncode == 0, p.stderr
        asked.append(int(p.stdout))
    # one after the other: each takes its share of what is left
    lines = [json.loads(x)["image"] for f in (tmp_path / "o").glob("*.jsonl") for x in open(f)]
    assert len(lines) == len(set(lines)) and sum(asked) == len(lines)
    from crowdlens.models.detect_files import detect_files, pictures_of
    last = Half()
    with pytest.warns(UserWarning, match="1 of 8 pictures"):
        got = detect_files(last, pictures_of(images), tmp_path / "o", 2)
    assert last.asked + len(lines) == 7 and len(got) == 8


def test_the_command_looks_at_a_picture_a_folder_and_a_film(tmp_path, monkeypatch, capsys):
    "With the network that ships; and judges it."
    from crowdlens import cli
    from crowdlens.core.frames import read_frames, write_film
    from crowdlens.dfine_fisheye import camera_set
    monkeypatch.setenv("CROWDLENS_OUT", str(tmp_path))
    files = camera_set(tmp_path / "set", n=(4, 4, 4), size=(320, 192), gap=2)
    pics = sorted((tmp_path / "set" / "val").iterdir())
    write_film(tmp_path / "f.mp4", map(read_image, pics), 5)
    net = str(ROOT / "data" / "tiny" / "street")
    for name, src, n in (("one", pics[0], 1), ("all", pics[0].parent, 4), ("film", tmp_path / "f.mp4", 4)):
        cli.app(["predict", str(src), "-w", net, "--name", name], standalone_mode=False)
        top, = tmp_path.glob(f"*/{name}")
        assert len(read_json(top / "images.json")["images"]) == n and (top / "report.html").exists()
        rows = read_json(top / "results.json")
        assert {r["image_id"] for r in rows} == set(range(1, n + 1))
    assert len(list(read_frames(top / "film.mp4"))) == 4
    cli.app(["evaluate", str(files["val"]), "-w", net, "--name", "judged"], standalone_mode=False)
    assert "map_50" in capsys.readouterr().out


def test_fisheye_people_through_inference(shared, tmp_path):
    from crowdlens.models.detect_files import predict
    top = shared / "realdata" / "cepdof_fisheye_people"
    got = predict(Half(), top, tmp_path / "o", pictures=2, tiles=400, det_db="cepdof/test", classes=["person"])
    db = read_json(got["det_db"])
    n = len(read_json(got["images"])["images"])
    assert n == len(db) and n > 0 and read_json(got["det_db_check"])["frames"] == n


def test_exported_folder_through_open_and_its_timing_script(tmp_path):
    "The written file is opened like any checkpoint; its script runs alone."
    pytest.importorskip("onnxruntime")
    import torch

    from crowdlens.core.letterbox import Letterbox
    from crowdlens.models import checkpoints
    from crowdlens.models.detector import Detector
    from crowdlens.models.export import export
    from crowdlens.models.small_detector import MEAN, STD, small_detector
    net, g = small_detector(["Bus"], 0).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p += .3 * p.std() * torch.randn(p.shape, generator=g)
    ck = checkpoints.Checkpoint(net, LabelMap.make(["Bus"]), Letterbox(64, 96, 32), MEAN, STD)
    with pytest.raises(InputError, match="differs"):
        export(ck, tmp_path / "no", tolerance=0.)
    assert not list((tmp_path / "no").glob("*.onnx"))
    export(ck, tmp_path / "o", size=(96, 128))
    got = checkpoints.open(tmp_path / "o" / "model.onnx")
    assert got.geometry.canvas == (96, 128) and got.labels.names == ("Bus",)
    b, s, l = Detector(got, device="cpu").detect([np.full((50, 60, 3), 90, np.uint8)])[0]
    assert len(b) == len(s) == len(l) > 0 and (b[:, 2] <= 60).all()
    r = subprocess.run([sys.executable, tmp_path / "o" / "time_onnx.py", "2", "1"], capture_output=True, text=True)
    assert r.returncode == 0 and "frames a second" in r.stdout, r.stderr


def test_a_film_cut_short_is_looked_at_as_far_as_it_goes(tmp_path):
    from crowdlens.core.frames import write_film
    from crowdlens.models.film_detect import detect_film
    rng = np.random.default_rng(0)
    src = tmp_path / "a.webm"
    write_film(src, [rng.integers(0, 255, (64, 96, 3), np.uint8) for _ in range(12)], 5)
    whole = detect_film(Half(), src, tmp_path / "w", batch=4, draw=False)
    assert whole["frames"] == 12
    data = src.read_bytes()
    (tmp_path / "b.webm").write_bytes(data[: len(data) // 2])
    cut = detect_film(Half(), tmp_path / "b.webm", tmp_path / "c", batch=4, draw=False)
    assert 0 < cut["frames"] < 12
    assert len(read_json(cut["results"])) == cut["frames"] == len(read_json(cut["images"])["images"])
