"MOT text and AVA lists: real files with their known counts, round trips."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from crowdlens.core import ava
from crowdlens.core.ava import (ava_rows, nearest_frame, read_ava,
                                read_excluded, read_label_types,
                                read_labelmap, read_seconds, save_ava)
from crowdlens.core.files import InputError
from crowdlens.core.mot import (check_sequence, mot_rows, read_mot,
                                read_seqinfo, save_mot)

px = hnp.arrays(float, st.tuples(st.integers(1, 30), st.just(4)),
                elements=st.floats(0, 4000).map(lambda v: round(v, 2)))


@settings(deadline=None, max_examples=40)
@given(px, st.randoms(use_true_random=False),
       st.sampled_from(["gt", "result", "det"]))
def test_mot_round_trip_in_any_order(tmp_path_factory, boxes, rnd, kind):
    p = tmp_path_factory.mktemp("m") / "a.txt"
    n = len(boxes)
    rows = mot_rows(np.arange(n) // 3 + 1, np.arange(n) % 3, boxes, .25,
                    cls=7, vis=.5)
    save_mot(p, rows, kind)
    lines = p.read_text().splitlines()
    rnd.shuffle(lines)
    p.write_text("\n\n".join(l.replace(",", " , ") for l in lines))
    back = read_mot(p)
    order = np.lexsort((back.boxes_xywh[:, 0], back.frame))
    want = np.lexsort((rows.boxes_xywh[:, 0], rows.frame))
    assert (back.frame[order] == rows.frame[want]).all()
    if kind != "det":
        np.testing.assert_allclose(back.boxes_xywh, rows.boxes_xywh)
        assert (back.id == rows.id).all()
    assert (back.cls == (7 if kind == "gt" else -1)).all()
    assert (back.conf == (1 if kind == "gt" else .25)).all()


@given(st.text("0123456789.,-eE na\n", max_size=60))
def test_mot_reads_or_names_a_line(tmp_path_factory, text):
    "Whatever the text: a table, or an error with a line."
    p = tmp_path_factory.getbasetemp() / "fuzz.txt"
    p.write_text(text)
    try:
        rows = read_mot(p)
    except InputError as e:
        assert e.line is not None and e.line <= text.count("\n") + 1
    else:
        assert np.isfinite(rows.boxes_xywh).all() and (rows.frame > 0).all()


@given(st.text("0123456789.,-m\t\n\"", max_size=60), st.booleans())
def test_ava_reads_or_names_a_line(tmp_path_factory, text, scored):
    p = tmp_path_factory.getbasetemp() / "fuzz.csv"
    p.write_text(text)
    try:
        rows = read_ava(p, scored)
    except InputError as e:
        assert e.line is not None
    else:
        assert np.isfinite(rows.boxes_xyxy_rel).all()


@pytest.mark.parametrize("text,line,what", [
    ("1,1,0,0,5,5\n1,2,0,0,5,5\n1,1,0,0,6,6\n", 3, "twice"),
    ("1,1,0,0,5,5,1,1,1\n0,2,0,0,5,5,1,1,1\n", 2, "begin at 0"),
    ("1,1,0,0,5,5\n-3,2,0,0,5,5\n", 2, "negative frame"),
    ("1,1,0,0,5\n", 1, "5 columns"),
    ("\xff", 1, "UTF-8"),
])
def test_mot_names_the_line(tmp_path, text, line, what):
    p = tmp_path / "gt.txt"
    p.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=what) as e:
        read_mot(p)
    assert e.value.line == line and str(p) in str(e.value)


def test_detections_may_repeat_the_id_minus_one(tmp_path):
    p = tmp_path / "det.txt"
    p.write_text("1,-1,0,0,5,5,.9\n1,-1,9,9,5,5,.8\n")
    assert len(read_mot(p)) == 2


def test_ava_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    box = np.sort(rng.uniform(0, 1, (50, 2, 2)), 1).reshape(50, 4).round(5)
    rows = ava_rows(np.array([f"m {i % 3}" for i in range(50)], object),
                    np.arange(50), box, np.arange(50) % 80 + 1, 3)
    save_ava(tmp_path / "a.csv", rows)
    back = read_ava(tmp_path / "a.csv")
    assert back.keys() == rows.keys()
    np.testing.assert_array_equal(back.boxes_xyxy_rel, box)
    assert (back.action == rows.action).all() and (back.person == 3).all()


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40, unique=True),
       st.floats(0, 100))
def test_nearest_frame_is_the_nearest(times, second):
    t = sorted(times)
    k = nearest_frame(t, second)
    assert abs(t[k - 1] - second) <= min(abs(np.array(t) - second)) + 1e-9


def test_label_map_dialects_disagree_in_nothing_but_scope(shared):
    lists = shared / "realdata/ava_lists"
    full = read_labelmap(lists / "ava_action_list_v2.2.pbtxt")
    some = read_labelmap(
        lists / "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
    old = read_labelmap(
        lists / "ava_action_list_v2.1_for_activitynet_2018.pbtxt.txt")
    assert len(full) == 80 and len(some) == 60 and len(old) == 60
    assert all(full[k] == v for k, v in some.items())
    types = read_label_types(lists / "ava_action_list_v2.2.pbtxt")
    kinds = list(types.values())
    assert [kinds.count(k) for k in ("PERSON_MOVEMENT",
            "OBJECT_MANIPULATION", "PERSON_INTERACTION")] == [14, 49, 17]
    birds = read_labelmap(
        shared / "realdata/ava_bird/annotations/ava_action_list_v2.2.pbtxt")
    assert len(birds) == 8 and birds[8] == "EggTurning"


def test_ava_lists(shared):
    lists = shared / "realdata/ava_lists"
    rows = read_ava(lists / "ava_val_v2.1_poses_excerpt.csv")
    assert len(rows) == 2180 and len(set(rows.movie)) == 2
    assert (rows.person == -1).all() and set(rows.action) <= set(range(1, 15))
    sample = read_ava(lists / "mmaction2_sample/ava_sample.csv")
    assert len(sample) == 8 and (sample.person == 0).all()
    assert sample.keys()[0] == ("0f39OWEqJ24", 902)
    assert len(read_ava(lists / "mmaction2_eval/gt.csv")) == 12
    pred = read_ava(lists / "mmaction2_eval/pred.csv", scored=True)
    assert len(pred) == 30 and pred.score[0] == .655
    with pytest.raises(InputError, match="scored=True"):
        read_ava(lists / "mmaction2_eval/pred.csv")
    assert read_excluded(
        lists / "mmaction2_sample/ava_excluded_timestamps_sample.csv") == {
            ("0f39OWEqJ24", 903), ("_-Z6wFjXtGQ", 902)}
    seconds = read_seconds(lists / "ava_included_timestamps_v2.2.txt")
    assert seconds == list(range(902, 1799))


def test_birds(shared):
    "Windows line ends, tabs, empty labels, empty exclusion files."
    top = shared / "realdata/ava_bird"
    ours = [read_ava(top / f"annotations/ava_{s}_v2.2.csv")
            for s in ("train", "val")]
    assert sum(map(len, ours)) == 32
    assert set(np.concatenate([r.action for r in ours])) == {1, 2, 8}
    up = top / "upstream/annotations"
    assert len(read_ava(up / "ava_train_v2.2.csv")) == 44
    assert read_excluded(up / "ava_train_excluded_timestamps_v2.2.csv") == set()
    for p in up.glob("person_box*/*.csv"):
        rows = read_ava(p, scored=True)
        assert len(rows) == 44
        assert (rows.action == -1).all() == ("val" in p.name)
        assert .9 < rows.score.min() <= 1


@pytest.mark.parametrize("seq,rows,people,ids,dets", [
    ("MOT17-04-FRCNN", 792, 336, 42, 205), ("MOT17-05-FRCNN", 73, 45, 9, 26)])
def test_mot17(shared, seq, rows, people, ids, dets):
    top = shared / "realdata/mot17_mini" / seq
    gt = read_mot(top / "gt/gt.txt")
    own = gt[(gt.conf != 0) & (gt.cls == 1)]
    assert (len(gt), len(own), len(set(own.id))) == (rows, people, ids)
    assert ((gt.vis >= 0) & (gt.vis <= 1)).all()
    assert len(read_mot(top / "det/det.txt")) == dets
    assert check_sequence(top) == []
    assert read_seqinfo(top / "seqinfo_upstream.ini").seqLength > 100


def test_stadtmitte(shared):
    top = shared / "realdata/mot_tud_stadtmitte"
    gt = read_mot(top / "TUD-Stadtmitte/gt/gt.txt")
    assert len(gt) == 1156 and len(set(gt.id)) == 10
    assert gt.frame.max() == 179 and (gt.cls == -1).all()
    # the film's 180th frame repeats the last: one of the 1130 rows is its
    det = read_mot(top / "TUD-Stadtmitte/det/det.txt")
    assert len(det) in (1129, 1130) and det.conf.max() > 1
    assert (det.frame <= 179).sum() == 1129
    assert len(read_mot(top / "tracker/TUD-Stadtmitte.txt")) == 749
    assert check_sequence(top / "TUD-Stadtmitte") == []


def test_sportsmot(shared):
    top = shared / "realdata/sportsmot_gt/v_ApPxnw_Jffg_c016"
    gt = read_mot(top / "gt/gt.txt")
    assert (len(gt), len(set(gt.id)), gt.frame.max()) == (3922, 12, 352)
    assert gt.id.min() == 0 and read_seqinfo(top).imHeight == 720
    assert check_sequence(top) == ["seqLength=352, 0 pictures in img1/"]


def test_other_mot_files(shared):
    real = shared / "realdata"
    ref = real / "mot_reference/MOT17"
    assert len(read_mot(ref / "gt/MOT17-09-FRCNN/gt/gt.txt")) == 10411
    assert len(read_mot(ref / "tracker/MOT17-09-FRCNN.txt")) == 5174
    for seq in (real / "mot_volleyball").glob("volleyball_*"):
        gt = read_mot(seq / "gt/gt.txt")
        assert (len(gt), len(set(gt.id))) == (240, 12)
        assert check_sequence(seq) == []
