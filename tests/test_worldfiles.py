"Files of the built-in world: flaws against the audit, kills, equal bytes."
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from crowdlens.core.ava import read_ava
from crowdlens.core.files import InputError, read_json
from crowdlens.core.frames import read_frames
from crowdlens.core.images import read_image
from crowdlens.core.mot import check_sequence, read_mot
from crowdlens.core.plant import flaw_counts
from crowdlens.core.truth import simulate_detector
from crowdlens.core.world import World
from crowdlens.core.worldfiles import (CLASSES, labelled, mot_truth,
                                       write_ava, write_coco, write_mot,
                                       write_yolo, yolo_text)
from crowdlens.core.yolo_set import FLAWS

SMALL = dict(size=(320, 192), people=(3, 8))


def digest(folder):
    "Name and content of every file below `folder`, notes of the run aside."
    return {p.relative_to(folder).as_posix():
            hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob("*"))
            if p.is_file() and p.name != ".world.json"}


def read_labels(p):
    return np.loadtxt(p, ndmin=2)


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    "A set with two of each flaw, as `write_yolo` wrote it."
    root = tmp_path_factory.mktemp("w") / "flawed"
    return root, write_yolo(root, train=64, val=24, flaws=2, **SMALL)


def test_every_flaw_is_planted_exactly(flawed):
    planted = [p.flaw for p in flawed[1]]
    want = flaw_counts(2) | {"wrong_columns": 4}  # a stray byte is no number
    assert {f: planted.count(f) for f in set(planted)} == want
    assert set(planted) == set(FLAWS)


def test_the_audit_finds_what_was_planted_and_no_more(flawed, tmp_path):
    audit = pytest.importorskip("crowdlens.audit")
    root, planted = flawed
    rows = audit.audit(root, out=str(tmp_path)).flaws.to_pylist()
    found = sorted((r["file"], r["line"], r["flaw"]) for r in rows)
    assert found == sorted((p.file, p.line, p.flaw) for p in planted)


def test_a_clean_set_has_no_flaw(tmp_path):
    audit = pytest.importorskip("crowdlens.audit")
    for scene in CLASSES:
        root = tmp_path / scene
        assert write_yolo(root, scene, train=16, val=8, **SMALL) == []
        rows = audit.audit(root, out=str(tmp_path)).flaws.to_pylist()
        rows = [r for r in rows if r["flaw"] != "unused_name"]
        assert rows == []


def test_processes_and_one_process_write_the_same(tmp_path):
    for k in (1, 2):
        write_yolo(tmp_path / str(k), train=12, val=4, flaws={
            "crlf": 1, "corrupt_jpeg": 1}, workers=k, **SMALL)
    one, two = digest(tmp_path / "1"), digest(tmp_path / "2")
    assert one == two and len(one) == 2 * 16 + 1


def test_killed_and_started_again_is_equal(tmp_path):
    "kill -9 of a script, without a main guard, while its workers write."
    call = "write_yolo({!r}, train=48, val=8, flaws={{'crlf': 2}}, workers=2,"\
        " size=(320, 192), people=(3, 8))"
    code = "from crowdlens.core.worldfiles import write_yolo\n" + call
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    p = subprocess.Popen([sys.executable, "-c", code.format(killed)])
    part = tmp_path / ".killed.part"
    end = time.time() + 120
    while len(list(part.glob("*/images/*.jpg"))) < 6 and time.time() < end:
        time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert part.is_dir() and not Path(killed).exists()
    time.sleep(.5)  # its workers notice
    for dst in (killed, whole):
        subprocess.run([sys.executable, "-c", code.format(dst)], check=True)
    assert digest(killed) == digest(whole)
    assert not part.exists()


def test_killed_while_planting_begins_anew(tmp_path, monkeypatch):
    import crowdlens.core.plant as m
    args = dict(train=8, val=4, flaws={"crlf": 2, "empty_label": 1}, **SMALL)
    def stop(s, i): raise KeyboardInterrupt
    monkeypatch.setitem(m._PLANT, "crlf", stop)
    with pytest.raises(KeyboardInterrupt):
        write_yolo(tmp_path / "a", **args)
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    assert len(write_yolo(tmp_path / "a", **args)) == 3
    write_yolo(tmp_path / "b", **args)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_other_data_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="other data"):
        write_yolo(tmp_path / "mine", train=4, val=4)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="no scene"):
        write_yolo(tmp_path / "a", "beach")
    with pytest.raises(InputError, match="10,000"):
        write_yolo(tmp_path / "a", train=40, val=4, seed=9_999)


@settings(deadline=None)
@given(hnp.arrays(float, st.tuples(st.integers(0, 9), st.just(4)),
                  elements=st.floats(0, 190)))
def test_label_text_keeps_a_thousandth_of_a_pixel(boxes):
    boxes = np.sort(boxes.reshape(-1, 2, 2), 1).reshape(-1, 4)
    text = yolo_text(boxes, np.zeros(len(boxes), int), (320, 192))
    back = np.array([l.split() for l in text.splitlines()], float)
    back = back.reshape(-1, 5)[:, 1:] * (320, 192, 320, 192)
    back = np.c_[back[:, :2] - back[:, 2:] / 2, back[:, :2] + back[:, 2:] / 2]
    np.testing.assert_allclose(back, boxes, atol=1e-3)


def test_labels_follow_the_rule():
    world = World("court", seed=2, people=15, size=(320, 192))
    for _, t in world.frames(3):
        boxes, labels = labelled(t)
        assert (labels == 0).sum() <= (t.visible >= .25).sum()
        assert (boxes[:, 2:] - boxes[:, :2] > 1.5).all()
        assert (boxes >= 0).all() and (boxes[:, 2] <= 320).all()
        every, _ = labelled(t, min_visible=0, min_size=0)
        assert len(every) >= len(boxes)


def test_coco_says_the_same_as_yolo(tmp_path):
    from pycocotools.coco import COCO
    files = write_coco(tmp_path / "c", train=8, val=4, **SMALL)
    write_yolo(tmp_path / "y", train=8, val=4, **SMALL)
    for split, f in files.items():
        coco = COCO(str(f))
        assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
        for im in coco.imgs.values():
            stem = Path(im["file_name"]).stem
            a = coco.imgToAnns[im["id"]]
            rows = read_labels(tmp_path / "y" / split / "labels" /
                               f"{stem}.txt")
            wh = (im["width"], im["height"]) * 2
            box = np.c_[rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 3:]] * wh
            np.testing.assert_allclose([x["bbox"] for x in a], box, atol=2e-3)
            assert [x["category_id"] for x in a] == (rows[:, 0] + 1).tolist()
            np.testing.assert_array_equal(
                read_image(tmp_path / "c" / split / im["file_name"]),
                read_image(tmp_path / "y" / split / "images" /
                           im["file_name"]))


def test_street_has_its_classes_and_names(tmp_path):
    files = write_coco(tmp_path / "s", "street", train=8, val=4, size=(
        320, 320), people=(12, 24))
    got = read_json(files["val"])
    assert [c["name"] for c in got["categories"]] == CLASSES["street"]
    names = [i["file_name"].split("_") for i in got["images"]]
    assert all(c.startswith("camera") and t in "MAEN" and f.endswith(".jpg")
               for c, t, f in names)
    train = {i["file_name"].split("_")[0]
             for i in read_json(files["train"])["images"]}
    assert not train & {n[0] for n in names}


@pytest.mark.parametrize("style", ["yolox", "dfine", None])
def test_sequence(tmp_path, style):
    world = World("court", seed=11, people=7, size=(320, 192))
    seq = write_mot(tmp_path / "seq", world, 20, style)
    assert check_sequence(seq) == []
    gt = read_mot(seq / "gt/gt.txt")
    truths = [t for _, t in world.frames(20)]
    assert (gt.id == mot_truth(truths, world.classes).id).all()
    own = gt[gt.cls == 1]
    assert (own.conf == 1).all() and (gt[gt.cls != 1].conf == 0).all()
    assert set(own.id) <= set(np.concatenate([t.ids for t in truths]))
    assert (seq / "det/det.txt").exists() == (style is not None)
    if style:
        det = read_mot(seq / "det/det.txt")
        box, score = simulate_detector(truths[9], style, seed=11)
        mine = det.at(10)
        np.testing.assert_allclose(mine.boxes_xyxy, box, atol=.011)
        np.testing.assert_allclose(mine.conf, score, atol=1e-4)
    before = digest(seq)
    write_mot(seq, world, 20, style)
    assert digest(seq) == before
    with pytest.raises(InputError, match="other data"):
        write_mot(seq, world, 21, style)


def test_clips_as_films_and_as_frames_agree(tmp_path):
    args = dict(train=1, val=1, seconds=3, **SMALL)
    for form in ("film", "frames"):
        write_ava(tmp_path / form, form=form, **args)
    a, b = (tmp_path / f / "annotations" for f in ("film", "frames"))
    assert digest(a) == digest(b)
    assert digest(tmp_path / "film/keyframes") == digest(
        tmp_path / "frames/keyframes")
    film = list(read_frames(tmp_path / "film/movies/court10000.mp4"))
    pics = list(read_frames(tmp_path / "frames/frames/court10000"))
    assert len(film) == len(pics) == 75
    for (i, t, x), (j, u, y) in zip(film, pics):
        assert i == j and abs(t - u) < 1e-3
        assert np.abs(x.astype(int) - y).mean() < 8
    key = read_image(tmp_path / "film/keyframes/court10000/0002.jpg")
    assert np.abs(pics[50][2].astype(int) - key).mean() < .5


def test_actions_in_the_csv_are_the_worlds(tmp_path):
    write_ava(tmp_path / "a", train=1, val=1, seconds=4, people=(5, 5),
              size=(320, 192))
    rows = read_ava(tmp_path / "a/annotations/ava_train.csv")
    world = World("court", 0, 5, (320, 192))
    for _, t in world.frames(100):
        if (t.index - 1) % 25 or t.index == 1: continue
        now = rows[rows.second == (t.index - 1) // 25]
        want = {(int(i), int(k) + 1) for i, a, v in
                zip(t.ids, t.actions, t.visible) if v >= .25
                for k in np.flatnonzero(a)}
        assert set(zip(now.person.tolist(), now.action.tolist())) == want
        for r in range(len(now)):
            box = t.boxes_xyxy[t.ids == now.person[r]][0]
            np.testing.assert_allclose(now.boxes_xyxy_rel[r] *
                                       (320, 192, 320, 192), box, atol=.01)
