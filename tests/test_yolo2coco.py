"""Stage 02: real sets, other people's COCO of the same boxes, ids, kills."""
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdlens import yolo2coco
from crowdlens.core.coco import read_coco
from crowdlens.core.files import InputError
from crowdlens.core.yolo import YoloCoco, index, read_set
from crowdlens.yolo2coco import Config, coco2yolo, convert, write

settings.register_profile("crowdlens", deadline=None, max_examples=40)
settings.load_profile("crowdlens")


def by_name(coco):
    "Sorted boxes by (file name, category name)."
    names = {c["id"]: c["name"] for c in coco["categories"]}
    files = {i["id"]: Path(i["file_name"]).name for i in coco["images"]}
    out = {}
    for a in coco["annotations"]:
        out.setdefault((files[a["image_id"]], names[a["category_id"]]),
                       []).append(a["bbox"])
    return {k: np.array(sorted(v)) for k, v in out.items()}


def test_our_coco_equals_cvats(shared):
    root = shared / "realdata/voc_formats"
    ours, theirs = convert(root), json.loads(
        (root / "coco_gt.json").read_text())
    a, b = by_name(ours), by_name(theirs)
    assert a.keys() == b.keys() and len(ours["annotations"]) == 99
    assert max(np.abs(a[k] - b[k]).max() for k in a) < 1e-3
    sizes = {i["file_name"]: (i["width"], i["height"]) for i in theirs["images"]}
    assert {i["file_name"]: (i["width"], i["height"]) for i in ours["images"]
            } == sizes


def test_fisheye8k_equals_its_derived_coco(shared):
    root = shared / "realdata/fisheye8k"
    a, b = by_name(convert(root, "train")), by_name(read_coco(root / "coco.json"))
    assert a.keys() == b.keys() and sum(map(len, a.values())) == 114
    assert max(np.abs(a[k] - b[k]).max() for k in a) < .02


REAL = {  # folder: {split: (images, boxes, left out)}
    "fisheye8k": dict(train=(4, 114, 0), val=(4, 114, 0)),
    "person_head_coco": dict(train=(6, 96, 0), val=(6, 96, 0)),
    "voc_formats": {None: (30, 99, 0)},
    "yolo_coco8/coco8": dict(train=(4, 13, 0), val=(4, 17, 0)),
    "yolo_coco8/coco8-seg": dict(train=(4, 13, 0), val=(4, 17, 0)),
    "yolo_messy_apd": dict(train=(33, 60, 12)),
    "yolo_messy_gaps": dict(train=(15, 18, 0)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets_convert_with_the_known_counts(shared, tmp_path, name):
    root = shared / "realdata" / name
    ys = read_set(root)
    assert set(ys.splits) == set(REAL[name])
    for split, want in REAL[name].items():
        ix, p = index(ys, split), tmp_path / f"{split}.json"
        left = write(ix, p)
        coco = read_coco(p)
        assert (len(coco["images"]), len(coco["annotations"]), len(left)) == want
        with open(p.with_suffix(".left_out.csv"), newline="") as f:
            assert len(list(csv.reader(f))) == len(left) + 1


def test_seg_polygons_give_the_boxes_of_coco8(shared):
    top = shared / "realdata/yolo_coco8"
    a, b = (by_name(convert(top / n, "train")) for n in ("coco8", "coco8-seg"))
    assert a.keys() == b.keys()
    assert max(np.abs(a[k] - b[k]).max() for k in a) < 2


def test_pycocotools_loads_a_real_set(shared, tmp_path, capsys):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    convert(shared / "realdata/person_head_coco", "train",
            out=tmp_path / "a.json", category_base=1)
    c = COCO(str(tmp_path / "a.json"))
    assert sorted(c.cats) == [1, 2] and min(c.anns) == 1
    assert [len(c.getAnnIds(catIds=[k])) for k in (1, 2)] == [50, 46]


# made sets

def make(root, rows, size=(100, 50), names=("person", "head")):
    "A set with an image for each list of rows."
    for k in ("images", "labels"):
        (root / k).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(n + "\n" for n in names))
    png = cv2.imencode(".png", np.zeros((size[1], size[0], 3), np.uint8))[1]
    for i, r in enumerate(rows):
        (root / f"images/{i:04d}.png").write_bytes(png.tobytes())
        if r is not None:
            (root / f"labels/{i:04d}.txt").write_text("".join(
                " ".join(map(str, x)) + "\n" for x in r))
    return root


FRACTION = st.floats(.01, 1)


@given(st.lists(st.lists(st.tuples(st.integers(0, 1), FRACTION, FRACTION,
                                   FRACTION, FRACTION), max_size=4),
                min_size=1, max_size=4),
       st.sampled_from([(100, 50), (4096, 2160), (33, 7919)]))
def test_there_and_back_moves_less_than_a_hundredth(tmp_path_factory, rows,
                                                    size):
    top = tmp_path_factory.mktemp("round")
    one = convert(make(top / "a", rows, size))
    coco2yolo(one, top / "b")
    (top / "b/images").mkdir()
    (top / "b/images/train").symlink_to(top / "a/images")
    two = convert(top / "b")
    strip = [{k: v for k, v in a.items() if k not in ("bbox", "area")}
             for a in one["annotations"]]
    assert [{k: a[k] for k in s} for s, a in zip(strip, two["annotations"])
            ] == strip and len(two["annotations"]) == len(strip)
    assert two["images"] == one["images"]
    assert two["categories"] == one["categories"]
    for a, b in zip(one["annotations"], two["annotations"]):
        x, y, w, h = np.abs(np.subtract(a["bbox"], b["bbox"]))
        assert max(x + w, y + h) < .01


def test_on_the_fly_equals_the_file(tmp_path):
    rng = random.Random(0)
    rows = [[(rng.choice([0, 1, 5]), *(f"{rng.random():.5f}" for _ in "1234"))
             for _ in range(rng.randrange(6))] for _ in range(30)] + [None]
    root = make(tmp_path / "a", rows, (640, 359))
    (root / "images/0003.png").write_bytes(b"no image")
    coco, ds = convert(root), YoloCoco(root)
    assert [i["id"] for i in coco["images"]] == [i + 1 for i in range(31)
                                                 if i != 3]
    assert [a["id"] for a in coco["annotations"]] == list(
        range(1, len(coco["annotations"]) + 1))
    flat = [dict(a, image_id=t["image_id"]) for t in map(
        ds.target, range(len(ds))) for a in t["annotations"]]
    assert flat == [{k: v for k, v in a.items() if k != "id"}
                    for a in coco["annotations"]]
    loader = pytest.importorskip("torch").utils.data.DataLoader(
        ds, batch_size=4, collate_fn=list, num_workers=0)
    assert sum(len(b) for b in loader) == 30


def test_the_same_on_every_machine(tmp_path):
    rows = [[(0, .5, .5, .1, .1)]] * 5
    a, b = (convert(make(tmp_path / k / "set", rows)) for k in "ab")
    assert a == b


def test_what_is_left_out_is_listed(tmp_path):
    root = make(tmp_path / "a", [
        [(0, .5, .5, .1, .1), (7, .5, .5, .1, .1), (0, .5, "nan", .1, .1),
         (0, .5, .5, 0, .1), (0, .5, .5), (0, 3, .5, .1, .1)],
        [(0, .5, .5, .1, .1)]])
    (root / "images/0001.png").write_bytes(b"no image")
    p = tmp_path / "o/all.json"
    left = write(index(root), p)
    assert [(line, flaw) for _, line, flaw, _ in left] == [
        (0, "unreadable_image"), (2, "class_out_of_range"), (3, "not_finite"),
        (4, "zero_size"), (5, "wrong_columns"), (1, "unreadable_image")]
    assert len(read_coco(p)["annotations"]) == 2  # past the edge stays
    clipped = convert(root, clip=True)
    assert len(clipped["annotations"]) == 1
    with pytest.raises(InputError, match="unreadable_image"):
        convert(root, strict=True)
    (root / "images/0001.png").unlink()
    with pytest.raises(InputError, match="0000.txt:2: class_out_of_range"):
        convert(root, strict=True, out=tmp_path / "s/all.json")
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("how", ["copy", "symlink"])
def test_images_beside_the_json(tmp_path, how):
    root = make(tmp_path / "a", [[(0, .5, .5, .1, .1)], None])
    for _ in range(2):
        coco = convert(root, out=tmp_path / "o/all.json", images=how)
    for i in coco["images"]:
        p = tmp_path / "o/images" / i["file_name"]
        assert p.read_bytes() == (root / "images" / i["file_name"]).read_bytes()
        assert p.is_symlink() == (how == "symlink")
    assert len(list((tmp_path / "o/images").iterdir())) == 2
    with pytest.raises(InputError, match="take none, copy or symlink"):
        convert(root, out=tmp_path / "o/all.json", images="move")


def test_names_in_a_hostile_json_stay_in_the_folder(tmp_path):
    coco = dict(images=[dict(id=1, file_name="../../x.jpg", width=9, height=9)],
                categories=[dict(id=0, name="a: [b\n")], annotations=[])
    with pytest.raises(InputError, match="leaves its folder"):
        coco2yolo(coco, tmp_path / "o")
    coco["images"][0]["file_name"] = "x.jpg"
    coco2yolo(coco, tmp_path / "o")
    (tmp_path / "o/images/train").mkdir(parents=True)
    assert read_set(tmp_path / "o").names == {0: "a: [b\n"}


def test_the_stage_writes_its_folder(tmp_path):
    root = make(tmp_path / "a", [[(0, .5, .5, .1, .1), (9, .5, .5, .1, .1)]])
    res = yolo2coco.run(Config(root=str(root), out=str(tmp_path / "o")))
    assert res.metrics == dict(images=1, rows=2, boxes=1, left_out=1,
                               no_label=0)
    have = {p.name for p in res.folder.iterdir()}
    assert {"all.json", "all.left_out.csv", "categories.json", "metrics.json",
            "config.json", "report.html"} <= have
    assert "0000.png" not in (res.folder / "report.html").read_text()[:200]


@pytest.mark.parametrize("root", ["gone", "empty"])
def test_bad_input_ends_with_code_2(tmp_path, root):
    (tmp_path / "empty").mkdir()
    p = subprocess.run([sys.executable, "-m", "crowdlens.yolo2coco", "-p",
                        f"root={tmp_path / root}", "--out", tmp_path / "o"],
                       capture_output=True, text=True)
    assert p.returncode == 2, p.stderr
    assert root in p.stderr and "Traceback" not in p.stderr
    assert not list((tmp_path / "o").rglob("*.json*")) or not list(
        (tmp_path / "o").rglob("all.json"))


def test_killed_and_started_again_is_complete_and_equal(tmp_path):
    rows = [[(0, .5, .5, .1, .1)] * 50] * 500
    root = make(tmp_path / "a", rows)
    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", "import sys; from crowdlens import yolo2coco "
             "as y; y.STEP = 2; print('go', flush=True); y.run(y.Config("
             "root=sys.argv[1], out=sys.argv[2]))", root, out],
            stdout=subprocess.PIPE)
    p = start(tmp_path / "whole")
    assert p.wait() == 0
    want = (tmp_path / "whole/02_yolo2coco/run/all.json").read_bytes()
    run = tmp_path / "o/02_yolo2coco/run"
    for n in range(3):
        p = start(tmp_path / "o")
        p.stdout.readline()
        for _ in range(2000):  # kill it in the middle of the file
            part = list(run.glob(".all.json*"))
            if part and part[0].exists() and part[0].stat(
                    ).st_size > 5 * 10**4 * (n + 1):
                break
            if p.poll() is not None:
                break
            time.sleep(.002)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert n or not (run / "metrics.json").exists()
    assert start(tmp_path / "o").wait() == 0
    assert (run / "all.json").read_bytes() == want
    assert not [f for f in run.iterdir() if f.name.startswith(".all")]


def test_a_full_disk_leaves_no_half_file(tmp_path):
    root = make(tmp_path / "a", [[(0, .5, .5, .1, .1)] * 20] * 60)
    index(root, out=tmp_path / "o")
    code = ("import resource, signal, sys\n"
            "from crowdlens import yolo2coco as y\n"
            "from crowdlens.core.files import InputError\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
            "try: y.run(y.Config(root=sys.argv[1], out=sys.argv[2]))\n"
            "except InputError as e: print(e); sys.exit(2)\n")
    p = subprocess.run([sys.executable, "-c", code, root, tmp_path / "o"],
                       capture_output=True, text=True,
                       env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert p.returncode == 2, p.stderr[-600:] + p.stdout[-300:]
    assert "no room on the disk" in p.stdout
    run = tmp_path / "o/02_yolo2coco/run"
    assert not [f.name for f in run.iterdir() if "all" in f.name]
