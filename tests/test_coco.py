"""COCO files: text of numbers, checks, label maps, pycocotools."""
import io
import contextlib
import copy

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdlens.core.coco import LabelMap, annotations_json, read_coco, write_coco
from crowdlens.core.files import InputError

settings.register_profile("crowdlens", deadline=None, max_examples=150)
settings.load_profile("crowdlens")
PIXEL = st.floats(-1e6, 1e6, allow_nan=False)
SIZE = st.floats(0, 1e5, allow_nan=False)


def as_list(text):
    "Entries of annotations as they stand in a file."
    return orjson.loads(b"[" + text[:-2] + b"]")


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 10**6), PIXEL,
                          PIXEL, SIZE, SIZE), max_size=8),
       st.integers(1, 2**50))
def test_annotations_as_text_say_what_they_were_given(rows, first):
    box = np.array([r[2:] for r in rows], float).reshape(-1, 4)
    got = as_list(annotations_json(first, [r[0] for r in rows],
                                   [r[1] for r in rows], box))
    assert [a["id"] for a in got] == list(range(first, first + len(rows)))
    for a, r, b in zip(got, rows, box):
        assert (a["image_id"], a["category_id"]) == r[:2]
        assert a["bbox"] == (np.rint(b * 1e6) / 1e6).tolist()
        assert a["area"] == np.rint(b[2] * b[3] * 1e6) / 1e6
        assert a["iscrowd"] == 0 and type(a["bbox"][0]) is float


GOOD = dict(images=[dict(id=1, file_name="a.jpg", width=40, height=30),
                    dict(id=2, file_name="b.jpg", width=40, height=30)],
            categories=[dict(id=3, name="person"), dict(id=9, name="head")],
            annotations=[dict(id=1, image_id=1, category_id=3,
                              bbox=[1, 2, 3, 4]),
                         dict(id=2, image_id=2, category_id=9,
                              bbox=[0, 0, 5, 5])])


def broken(change):
    d = copy.deepcopy(GOOD)
    change(d)
    return d


@pytest.mark.parametrize("change, said", [
    (lambda d: d.pop("categories"), "no list 'categories'"),
    (lambda d: d["images"][1].pop("width"), r"images\[1\] has no 'width'"),
    (lambda d: d["images"].append("x"), r"images\[2\] has no 'id'"),
    (lambda d: d["images"][1].update(id=1), "id 1 stands twice in images"),
    (lambda d: d["categories"][1].update(id=3), "twice in categories"),
    (lambda d: d["annotations"][1].update(id=1), "twice in annotations"),
    (lambda d: d["annotations"][1].update(image_id=7), "image_id 7"),
    (lambda d: d["annotations"][1].update(category_id=0), "category_id 0"),
    (lambda d: d["annotations"][1].update(bbox=None), "has the bbox None"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("nan")]),
     "annotation 2 has the bbox"),
    (lambda d: d["annotations"][1].update(bbox=["1", 2, 3, 4]), "bbox"),
])
def test_faults_are_named(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        read_coco(broken(change))
    p = tmp_path / "a.json"
    p.write_bytes(orjson.dumps(broken(change)))
    with pytest.raises(InputError, match="a.json: "):
        read_coco(p)


def test_results_and_missing_files_are_told_apart(tmp_path):
    p = tmp_path / "r.json"
    p.write_text("[]")
    with pytest.raises(InputError, match="give the annotations"):
        read_coco(p)
    with pytest.raises(InputError, match="no such file"):
        read_coco(tmp_path / "gone.json")


def test_a_failing_source_leaves_no_file(tmp_path):
    def parts():
        yield annotations_json(1, [1], [3], [[0, 0, 1, 1]])
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError):
        write_coco(tmp_path / "a.json", {}, [], [], parts())
    assert list(tmp_path.iterdir()) == []


def test_pycocotools_reads_what_is_written(tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    p = tmp_path / "a.json"
    write_coco(p, dict(description="x"), GOOD["categories"],
               [[i] for i in GOOD["images"]],
               [annotations_json(1, [1, 2], [3, 9], [[1, 2, 3, 4], [0, 0, 5, 5]]),
                b"", annotations_json(3, [2], [3], [[1, 1, 1, 1]])])
    with contextlib.redirect_stdout(io.StringIO()):
        c = COCO(str(p))
    assert sorted(c.anns) == [1, 2, 3] and c.anns[2]["area"] == 25
    assert c.getCatIds(catNms=["head"]) == [9]
    assert len(c.getAnnIds(imgIds=[2])) == 2


@given(st.dictionaries(st.integers(0, 500), st.text(min_size=1), min_size=1,
                       max_size=20))
def test_labels_go_to_ids_and_back(names):
    lm = LabelMap.make(names)
    labels = np.arange(len(lm))
    assert lm.to_labels(lm.to_ids(labels)).tolist() == labels.tolist()
    assert LabelMap.make(lm.categories()) == lm
    assert [lm.label(i) for i in lm.ids if str(i) not in lm.names] == [
        k for k, i in enumerate(lm.ids) if str(i) not in lm.names]


def test_objects365_names(shared):
    facts = orjson.loads((shared / "reference/objects365.json").read_bytes())
    assert list(LabelMap.known("objects365").names) == facts["names"]
    lm = LabelMap.known("objects365")
    coco = LabelMap.known("coco")
    there = facts["coco80_to_objects365"]
    assert lm.names[there[coco.label("person")]] == "Person"
    assert lm.names[there[coco.label("zebra")]] == "Zebra"
