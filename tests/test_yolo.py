"""Reading YOLO sets: numbers, rows, layouts, the cache, bad input."""
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from crowdlens.core.files import InputError
from crowdlens.core.images import header, image_size, read_image
from crowdlens.core.yolo import YoloCoco, index, read_set
from crowdlens.core.yolo_rows import REASONS, check_rows, read_rows

settings.register_profile("crowdlens", deadline=None, max_examples=150)
settings.load_profile("crowdlens")
PNG = cv2.imencode(".png", np.full((50, 100, 3), 90, np.uint8))[1].tobytes()


# numbers and rows

@given(st.floats(min_value=-1e15, max_value=1e15, allow_nan=False))
@example(0.4571428571428571)
@example(5e-324)
@example(9007199254740993.0)
def test_a_written_float_is_read_as_python_reads_it(x):
    r = read_rows([f"0 {x!r} {x:.6f} {x:.17e} 1\n".encode()])
    assert r.v[0, 1:4].tolist() == [x, float(f"{x:.6f}"), float(f"{x:.17e}")]


@given(st.from_regex(r"[+-]?[0-9]{0,22}\.?[0-9]{0,22}([eE][+-]?[0-9]{1,3})?",
                     fullmatch=True))
@example("0" * 25 + "." + "0" * 25 + "1")
@example("1e22")
@example("123456789012345678e4")
def test_any_decimal_is_read_as_python_reads_it(text):
    try:
        want = float(text)
    except ValueError:
        want = None
    if want is None and not text:
        return
    r = read_rows([f"0 {text} 1 1 1\n".encode()])
    reason = REASONS[check_rows(r, {0}, np.zeros((1, 2))).reason[0]]
    if want is None:
        assert reason == "wrong_columns"
    elif np.isinf(want):
        assert reason == "not_finite"
    else:
        assert r.v[0, 1] == want


WORDS = st.sampled_from(["0", "1", "7", "-1", "0.5", "nan", "inf", "-inf", "x",
                         "person", "1,5", "0.25", "1e-3", "-.5", "1_0", ".5",
                         "0.1234567890123456789012345", "é", "\0", "1e999"])
ROW = st.lists(WORDS, max_size=9)


def judge(words, pose=0):
    "What `check_rows` should say of a row, one rule after the other."
    def number(w):
        try:
            return float(w) if "_" not in w else None
        except ValueError:
            return None
    x = [number(w) for w in words]
    n = len(words)
    if not (n == pose or n in (5, 6) or (n >= 7 and n % 2)) or None in x[1:]:
        return "wrong_columns"
    if any(v is not None and not np.isfinite(v) for v in x):
        return "not_finite"
    if x[0] is None or x[0] != int(x[0]):
        return "class_not_integer"
    if x[0] not in (0, 1):
        return "class_out_of_range"
    if n >= 7 and n != pose:
        p = np.array(x[1:]).reshape(-1, 2)
        w, h = p.max(0) - p.min(0)
    else:
        w, h = x[3:5]
    return "zero_size" if w <= 0 or h <= 0 else None


@given(st.lists(st.tuples(ROW, st.sampled_from(["\n", "\r\n", "\r", " \n",
                                                "\n\n"])), max_size=6),
       st.sampled_from([0, 8]), st.booleans())
def test_rows_equal_a_plain_reading(rows, pose, bom):
    text = "".join(" ".join(w) + end for w, end in rows)
    lines = [re.split("[ \t]+", x.strip(" ")) for x in
             re.split("\r\n|\r|\n", text)]
    want = [(i, judge(w, pose)) for i, w in enumerate(lines, 1) if w != [""]]
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode()
    r = read_rows([b"", data], pose)
    got = check_rows(r, {0, 1}, np.full((len(r.line), 2), 100), pose)
    said = [REASONS[i] for i in got.reason]
    assert r.line.tolist() == [n for n, _ in want]
    assert [None if s in ("", "past_edge") else s for s in said] == [
        s for _, s in want]
    assert set(r.file.tolist()) <= {1}


def test_a_polygon_with_a_very_long_number_keeps_its_box():
    r = read_rows([b"0 .1 .2 0.30000000000000000000000000 .2 .3 .4\n"])
    assert np.allclose(r.v[0, 1:5], [.2, .3, .2, .2])


# images

def test_headers_agree_with_pillow(shared):
    n = 0
    for p in sorted((shared / "realdata").rglob("*")):
        if p.suffix.lower() not in (".jpg", ".jpeg", ".png") or p.stat(
                ).st_size == 0:
            continue
        try:
            with Image.open(p) as im:
                want = ImageOps.exif_transpose(im).size
        except OSError:
            try:
                with Image.open(p) as im:
                    want = im.size
            except OSError:
                with pytest.raises(InputError):
                    image_size(p)
                continue
        assert image_size(p) == want, p
        n += 1
    assert n > 300


def test_broken_images_read_or_say_so(shared):
    folder = shared / "realdata/broken_images"
    bad = []
    for p in sorted(folder.glob("*.*g")):
        try:
            a = read_image(p)
        except InputError:
            bad.append(p.name)
            continue
        assert a.dtype == np.uint8 and a.shape[1::-1] == image_size(p)
        with Image.open(p) as im:
            want = np.asarray(ImageOps.exif_transpose(im).convert("RGB"), int)
        assert np.abs(a - want).mean() < 3, p  # decoders differ a little
    assert bad == ["broken.png", "truncated_image.png"]


@pytest.mark.parametrize("ext", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_in_every_format(tmp_path, ext, turn):
    rng = np.random.default_rng(turn)
    a = cv2.resize(rng.integers(0, 255, (3, 4, 3), np.uint8), (48, 32))
    exif = Image.Exif()
    exif[0x112] = turn
    p = tmp_path / f"a.{ext}"
    Image.fromarray(a).save(p, exif=exif)
    with Image.open(p) as im:
        want = np.asarray(ImageOps.exif_transpose(im).convert("RGB"), int)
    assert header(p) == (*want.shape[1::-1], turn)
    assert np.abs(read_image(p) - want).mean() < 3


def test_a_thumbnail_does_not_hide_the_size(tmp_path):
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "x" * 30_000
    p = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(p, exif=exif)
    assert header(p) == (30, 40, 6)


# layouts

LABEL = "0 .5 .5 .2 .4\n1 .25 .5 .1 .2\n"


def put(root, files):
    "Write files; True stands for an image, text for itself."
    for name, what in files.items():
        p = root / name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(PNG if what is True else what.encode())
    return root


YAML = "names: [person, head]\n"
FORMS = {
    "train/images": ("train", {
        "data.yaml": "train: train/images\n" + YAML,
        "train/images/a.png": True, "train/labels/a.txt": LABEL}),
    "images/train": ("train", {
        "data.yaml": "path: .\ntrain: images/train\n" + YAML,
        "images/train/a.png": True, "labels/train/a.txt": LABEL}),
    "map of names": ("val", {
        "x.yml": "val: images/val\nnames:\n  0: person\n  1: head\n",
        "images/val/a.PNG": True, "labels/val/a.txt": LABEL}),
    "several folders": ("train", {
        "data.yaml": "train: [images/one, images/two]\n" + YAML,
        "images/two/a.png": True, "labels/two/a.txt": LABEL,
        "images/one/notes.md": "nothing"}),
    "file list": ("test", {
        "data.yaml": "test: lists/test.txt\n" + YAML,
        "lists/test.txt": "./images/a.png\n\n", "images/a.png": True,
        "images/b.png": True, "labels/a.txt": LABEL, "labels/b.txt": LABEL}),
    "windows list": ("train", {
        "data.yaml": "train: train.txt\n" + YAML,
        "train.txt": "images\\a.png\r\n", "images/a.png": True,
        "labels/a.txt": LABEL}),
    "roboflow": ("train", {
        "data.yaml": "train: ../train/images\nval: ../valid/images\n" + YAML,
        "train/images/a.png": True, "train/labels/a.txt": LABEL}),
    "names file": ("train", {
        "data.yaml": "train: images\nnames: my.names\n",
        "my.names": "person\nhead\n\n", "images/a.png": True,
        "labels/a.txt": LABEL}),
    "labelImg": (None, {
        "classes.txt": "person\r\nhead\r\n", "images/a.png": True,
        "labels/a.txt": LABEL, "labels/classes.txt": "person\nhead\n"}),
    "no images folder": (None, {
        "classes.txt": "person\nhead\n", "a.png": True, "a.txt": LABEL}),
    "darknet": (None, {
        "obj.data": "classes = 2\ntrain = data/train.txt\nnames = "
                    "data/obj.names\nbackup = backup/\n",
        "obj.names": "person\nhead\n", "train.txt":
        "data/obj_train_data/a.png\n", "obj_train_data/a.png": True,
        "obj_train_data/a.txt": LABEL}),
    "nested": ("train", {
        "data.yaml": "train: images\n" + YAML, "images/cam 1/x/a.png": True,
        "labels/cam 1/x/a.txt": LABEL}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_boxes(tmp_path, form):
    split, files = FORMS[form]
    root = put(tmp_path / "set", files)
    ix = index(root, split)
    assert ix.names == {0: "person", 1: "head"}
    assert len(ix) == 1 and ix.images["status"].to_pylist() == ["rows"]
    assert ix.boxes_xyxy().tolist() == [[40, 15, 60, 35], [20, 20, 30, 30]]
    bad = ix.flaws["flaw"].to_pylist()
    assert bad == {"roboflow": ["bad_path"]*2,
                   "darknet": ["bad_path"]*2}.get(form, [])
    image, target = YoloCoco(root, split)[0]
    assert image.shape == (50, 100, 3)
    assert [a["bbox"] for a in target["annotations"]] == [
        [40, 15, 20, 20], [20, 20, 10, 10]]


def test_paths_of_another_machine(tmp_path):
    root = put(tmp_path / "set", {
        "data.yaml": "path: /gone/data\ntrain: C:\\Users\\me\\images\\train\n"
                     "val: ..\\images\\val\n" + YAML,
        "images/train/a.png": True, "images/val/b.png": True})
    ys = read_set(root)
    assert list(ys.splits) == ["train", "val"]
    assert sorted(f[2] for f in ys.flaws) == [1, 2, 3]
    both = [index(ys, s).flaws["flaw"].to_pylist() for s in ys.splits]
    assert sum(both, []).count("bad_path") == 3


def test_odd_names_loops_and_companions(tmp_path):
    names = ["with blank", "ümläut", "quote\"s'", "line\nbreak", "a.b.c"]
    root = put(tmp_path / "set", {"classes.txt": "person\nhead\n", **{
        f"images/{n}.png": True for n in names}, **{
        f"labels/{n}.txt": LABEL for n in names},
        "labels/orphan.txt": LABEL, "labels/classes.txt": "person\n",
        "images/.hidden.png": True})
    (root / "images/loop").symlink_to(root / "images")
    (root / "images/self.png").symlink_to("self.png")
    odd = os.fsencode(root) + b"/images/k\xe4se.png"
    Path(os.fsdecode(odd)).write_bytes(PNG)
    ix = index(root)
    assert len(ix) == len(names) + 2
    assert sorted(ix.flaws["flaw"].to_pylist()) == [
        "missing_label", "missing_label", "orphan_label", "unreadable_image"]
    for i, f in enumerate(ix.images["file"].to_pylist()):
        assert os.path.lexists(ix.path(i)), f
    assert os.fsencode(ix.path([i for i, f in enumerate(
        ix.images["file"].to_pylist()) if "se.png" in f][0])) == odd


def test_ten_thousand_files_in_one_folder(tmp_path):
    root = put(tmp_path / "set", {"classes.txt": "person\n", "images/x": ""})
    for i in range(10_000):
        (root / f"images/{i}.png").touch()
    ix = index(root)
    assert len(ix) == 10_000 and ix.images["file"][1].as_py() == "images/1.png"


def test_pose_and_polygon_rows(tmp_path):
    pose = "0 .5 .5 .2 .4 " + " ".join(["0.1"] * 6) + "\n"
    root = put(tmp_path / "set", {
        "data.yaml": "train: images\nkpt_shape: [2, 3]\n" + YAML,
        "images/a.png": True, "labels/a.txt": pose + "0 .1 .2 .3 .2 .2 .4\n"
        "0 .5 .5 .1 .1 .75\n"})
    ix = index(root, "train")
    assert ix.boxes["kind"].to_pylist() == [3, 2, 1]
    assert np.allclose(ix.boxes_xyxy()[:2], [[40, 15, 60, 35], [10, 10, 30, 20]])
    assert ix.boxes["conf"].to_pylist()[2] == .75


# bad input

@pytest.mark.parametrize("files, said", [
    ({"data.yaml": "train: images\n"}, "no names of classes"),
    ({"data.yaml": "names: []\n"}, "no names of classes"),
    ({"data.yaml": "names: [a\ntrain: x"}, "data.yaml:2"),
    ({"data.yaml": "names: [a]\ntrain: gone\n"}, "none of its splits"),
    ({"readme.md": "hello"}, "no data.yaml"),
    ({"obj.data": "names = gone.names\n"}, "file of names is not there"),
])
def test_bad_sets_are_refused(tmp_path, files, said):
    with pytest.raises(InputError, match=said) as e:
        read_set(put(tmp_path / "set", files))
    assert "->" in str(e.value) or ":2" in said or "names" in said


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        index(tmp_path / "gone")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    root = put(tmp_path / "set", {"classes.txt": "a\n", "images/a.png": True})
    real = os.scandir

    def scandir(p):
        if str(p).endswith("images"):
            raise PermissionError(13, "Permission denied", str(p))
        return real(p)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="images: may not be read"):
        index(root)


def test_import_loads_no_torch():
    code = ("import crowdlens.core.yolo, crowdlens.core.boxes, sys;"
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# the cache

def random_set(root, n, seed):
    rng = random.Random(seed)
    files = {"classes.txt": "person\nhead\n"}
    for i in range(n):
        files[f"images/{i:03d}.png"] = True
        if rng.random() < .9:
            files[f"labels/{i:03d}.txt"] = "".join(
                f"{rng.choice([0, 1, 1, 7])} {rng.random():.6f} .5 .1 "
                f"{rng.choice(['.1', '0', 'nan', '.9'])}\n"
                for _ in range(rng.randrange(5)))
    return put(root, files)


def same(a, b):
    "Whether two indexes say the same, whenever the files were written."
    key = ["file", "line", "flaw", "detail"]
    return (a.images.equals(b.images) and a.boxes.to_pylist().__repr__()
            == b.boxes.to_pylist().__repr__()
            and a.flaws.select(key).equals(b.flaws.select(key)))


@pytest.mark.parametrize("seed", range(4))
def test_a_cache_brought_up_to_date_equals_a_fresh_one(tmp_path, seed):
    root, rng = random_set(tmp_path / "set", 60, seed), random.Random(seed)
    index(root, out=tmp_path / "a")
    for step in range(3):
        for _ in range(5):
            p = rng.choice(sorted((root / "labels").iterdir()))
            p.write_text(p.read_text() + f"{rng.randrange(3)} .5 .5 .1 .1\n")
        rng.choice(sorted((root / "images").iterdir())).unlink()
        put(root, {f"images/new{step}.png": True,
                   f"labels/new{step}.txt": "0 .5 .5 2 .1\n"})
        old = index(root, out=tmp_path / "a")
        assert 0 < old.parsed < 10
        assert same(old, index(root, out=tmp_path / f"b{step}"))
        assert index(root, out=tmp_path / "a").parsed == 0


def test_new_names_are_a_new_index(tmp_path):
    root = put(tmp_path / "set", {"classes.txt": "person\n", "images/a.png":
                                  True, "labels/a.txt": LABEL})
    assert index(root).boxes["ok"].to_pylist() == [True, False]
    (root / "classes.txt").write_text("person\nhead\n")
    assert index(root).boxes["ok"].to_pylist() == [True, True]


def test_a_damaged_cache_is_made_anew(tmp_path):
    root = random_set(tmp_path / "set", 20, 0)
    first = index(root, out=tmp_path / "o")
    for p in (tmp_path / "o/.cache/yolo").rglob("*.arrow"):
        p.write_bytes(p.read_bytes()[:200])
    again = index(root, out=tmp_path / "o")
    assert again.parsed == 20 and len(again.boxes) == len(first.boxes)


def test_killed_while_indexing_and_started_again(tmp_path):
    root = random_set(tmp_path / "set", 400, 1)
    code = ("import sys; from crowdlens.core import yolo; yolo.BATCH = 4\n"
            "print('go', flush=True)\n"
            "while True: yolo.index(sys.argv[1], out=sys.argv[2]); "
            "(__import__('pathlib').Path(sys.argv[1])/'images/000.png').touch()")
    want = None
    for wait in (.05, .15, .3):
        p = subprocess.Popen([sys.executable, "-c", code, root, tmp_path / "o"],
                             stdout=subprocess.PIPE)
        p.stdout.readline()
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
        got = index(root, out=tmp_path / "o")
        want = index(root, out=tmp_path / f"f{wait}")
        assert same(got, want)
    left = [p.name for p in (tmp_path / "o").rglob("*") if p.is_file()]
    assert len(left) <= 4 + 2 * 3, left  # at most what the kills left half


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    root = random_set(tmp_path / "set", 300, 2)
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, "
            "(9000, 9000)); import signal; signal.signal(signal.SIGXFSZ, "
            "signal.SIG_IGN)\n"
            "from crowdlens.core.yolo import index\n"
            "from crowdlens.core.files import InputError\n"
            "try: index(sys.argv[1], out=sys.argv[2])\n"
            "except InputError as e: print(e); sys.exit(2)")
    p = subprocess.run([sys.executable, "-c", code, root, tmp_path / "o"],
                       capture_output=True, text=True)
    assert p.returncode == 2, p.stderr[-800:]
    assert "File too large" in p.stdout and "make room" in p.stdout
    assert not list((tmp_path / "o").rglob("*.arrow"))


def test_a_description_kept_elsewhere(tmp_path):
    data = put(tmp_path / "data/set", {"images/train/a.png": True,
                                       "labels/train/a.txt": LABEL})
    put(tmp_path / "conf", {"my.yaml": f"path: {data}\ntrain: images/train\n"
                            + YAML})
    put(tmp_path / "conf", {"gone.yaml": f"path: {data}x\ntrain: images/train\n"
                            + YAML})
    ix = index(tmp_path / "conf/my.yaml")
    assert ix.images["file"].to_pylist() == ["images/train/a.png"]
    assert ix.path(0) == data / "images/train/a.png"
    assert len(ix.flaws) == 0
    with pytest.raises(InputError, match="none of its splits"):
        read_set(tmp_path / "conf/gone.yaml")


def test_a_label_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    root = put(tmp_path / "set", {"classes.txt": "a\n", "images/a.png": True,
                                  "labels/a.txt": "0 1 1 1 1\n"})
    real = os.open

    def closed(p, *a, **k):
        if str(p).endswith("labels/a.txt"):
            raise PermissionError(13, "Permission denied", str(p))
        return real(p, *a, **k)
    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(InputError, match="labels/a.txt: may not be read"):
        index(root)
    assert not list((tmp_path / "out").rglob("*.arrow"))
