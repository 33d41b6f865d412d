"Action data and scores: real files with known figures, damage, property tests."
import json

import av
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from crowdlens.core import action_boxes as ab
from crowdlens.core.action_data import ActionClips, add_boxes, add_objects, read_annotations
from crowdlens.core.action_sets import Films, SetFiles, check_set, find_files, group_classes, open_set
from crowdlens.core.ava import ava_rows, read_ava, read_labelmap
from crowdlens.core.clips import ClipRule, Draw, Film, Pictures, open_frames, pick_frames, read_clip
from crowdlens.core.files import InputError
from crowdlens.core.frames import read_frames, write_film
from crowdlens.metrics.actions import average_precision, chance, frame_ap, frame_map

GREY = [np.full((32, 48, 3), 2 * k + 20, np.uint8) for k in range(100)]


def test_ava_lists_known_figure(shared):
    "The made-up set whose mAP its repository asserts."
    top = shared / "realdata/ava_lists/mmaction2_eval"
    want = json.loads((top / "expected.json").read_text())["overall_mAP_at_0.5IOU"]
    got = frame_map(top / "gt.csv", top / "pred.csv", top / "action_list.txt")
    assert got["map_50"] == pytest.approx(want, abs=5e-9)


def test_ava_lists_perfect_boxes_score_one(shared):
    "Ground truth with a score of its own: every class that exists is 1."
    top = shared / "realdata/ava_lists"
    gt = read_ava(top / "ava_val_v2.1_poses_excerpt.csv")
    assert len(gt) == 2180
    det = ava_rows(gt.movie, gt.second, gt.boxes_xyxy_rel, gt.action, score=np.linspace(.1, 1, len(gt)))
    rows = frame_ap(gt, det, top / "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
    have = [r for r in rows if r["num_gt"]]
    assert have and all(r["ap"] > .95 for r in have)  # equal boxes of two people pick the first one
    assert all(r["ap"] is None for r in rows if not r["num_gt"])
    c = chance(gt, top / "ava_action_list_v2.2.pbtxt")
    assert 0 < c["map_50"] < .5


def bird(shared, split):
    top = shared / "realdata/ava_bird"
    f = find_files(top, split)
    films = Films(f.films, begin=64 / 30, fps=30)
    return f, films, open_set(f, films)


@pytest.mark.parametrize("split", ["train", "val"])
def test_ava_bird_goes_through(shared, split):
    "Folders of frames whose timestamps are not seconds: audit, reading, scores."
    f, films, data = bird(shared, split)
    assert len(data) == 8 and sum(len(a) for k in data.frames for a in k.actions) == 16
    odd = check_set(data, films, ClipRule(), f.annotations)  # second 1 lies before the first frame
    assert [r["row"] for r in odd] == [1] and "second 1 is not in it" in odd[0]["what"]
    movie = data.frames[0].movie
    for second, frame in ((3, 27), (4, 57), (8, 177)):
        ref = films(movie).around(second, ClipRule())[32]
        assert films(movie).files[ref].stem.endswith(f"{frame:06d}")
    item = ActionClips(data, films, ClipRule(short=64)).item(3)
    assert item["slow"].shape[:2] == (3, 4) and item["fast"].shape[:2] == (3, 32)
    gt = read_ava(f.csv)
    det = ava_rows(gt.movie, gt.second, gt.boxes_xyxy_rel, gt.action, score=.5)
    assert frame_map(gt, det, f.labelmap)["map_50"] == 1


def test_real_films_read_around_their_ends(shared):
    "A stream with a damaged end, and one of three frames a second."
    for name, size in (("demo.mp4", (340, 256)), ("mmtracking_demo.mp4", (1920, 1080))):
        film = Film(shared / "realdata/videos" / name)
        for second in (0, film.times[-1]):
            slow, fast, got = read_clip(film, second, ClipRule(short=64))
            assert got == size and slow.shape[0] == 4 and fast.shape[0] == 32 and fast.std() > 5


def test_frames_equal_those_of_a_whole_reading(shared):
    "Random access gives what reading from the start gives, pixel by pixel."
    path = shared / "realdata/videos/demo.mp4"
    want = [im for _, _, im in read_frames(path)]
    for ahead in (True, False):
        film = Film(path, ahead=ahead)
        for at in ([200, 30, 31], [32, 90], [5], [100, 150, 101]):
            for k, im in zip(at, film.fetch(at)):
                np.testing.assert_array_equal(im, want[k])


def test_a_cut_film_repeats_its_last_frame(tmp_path):
    write_film(tmp_path / "a.webm", GREY, quality=5)
    raw = (tmp_path / "a.webm").read_bytes()
    (tmp_path / "b.webm").write_bytes(raw[:len(raw) * 2 // 3])
    film = Film(tmp_path / "b.webm")
    assert 10 < len(film) < 100
    _, fast, _ = read_clip(film, film.times[-1], ClipRule(short=32))
    assert (fast[-1] == fast[-5]).all()
    (tmp_path / "c.mp4").write_bytes(raw[:50])
    with pytest.raises(InputError, match="c.mp4"):
        Film(tmp_path / "c.mp4")


def test_one_frame_portrait_and_tiny(tmp_path):
    write_film(tmp_path / "one.mp4", GREY[:1])
    slow, fast, _ = read_clip(Film(tmp_path / "one.mp4"), 0, ClipRule(short=16))
    assert (fast == fast[:1]).all() and len(fast) == 32
    write_film(tmp_path / "tall.mp4", [im.transpose(1, 0, 2) for im in GREY])
    slow, _, size = read_clip(Film(tmp_path / "tall.mp4"), 2, ClipRule(short=64, long=90))
    assert size == (32, 48) and slow.shape[1:3] == (90, 60)
    write_film(tmp_path / "tiny.mp4", [im[:2, :2] for im in GREY])
    assert read_clip(Film(tmp_path / "tiny.mp4"), 2, ClipRule(short=8))[0].shape[1:3] == (8, 8)


@given(st.integers(1, 300), st.sampled_from([(64, 16, 8), (64, 8, 4), (32, 8, 4)]), st.integers(1, 3))
def test_sampling_stays_inside_and_in_order(n, sizes, rate):
    frames, tau, alpha = sizes
    rule = ClipRule(frames=frames, tau=tau, alpha=alpha, rate=rate)
    slow, fast = pick_frames(rule, n)
    assert len(slow) == frames // tau and len(fast) == len(slow) * alpha
    for v in (slow, fast):
        assert v.min() >= 0 and v.max() < n and (np.diff(v) >= 0).all()


box = st.tuples(*[st.floats(-50, 250)] * 2, *[st.floats(0, 200)] * 2)


@given(st.lists(box, min_size=1, max_size=8), st.integers(0, 9))
def test_changed_boxes_stay_in_the_frame(boxes, seed):
    b, keep = ab.clip_boxes(ab.from_xywh(boxes), (200, 150))
    assert len(b) == len(keep) and (b[:, 2:] > b[:, :2]).all()
    rng = np.random.default_rng(seed)
    for got in (ab.extend_boxes(b, (200, 150)), ab.jitter_boxes(b, (200, 150), rng)):
        assert got.shape == b.shape and (got >= 0).all()
        assert (got[:, [0, 2]] <= 199).all() and (got[:, [1, 3]] <= 149).all()
        assert (got[:, 2:] > got[:, :2]).all()


@settings(max_examples=40)
@given(st.lists(st.booleans(), max_size=30), st.integers(0, 5))
def test_ap_against_the_definition(hit, missed):
    n = sum(hit) + missed
    got = average_precision(np.array(hit, bool), n)
    if not n:
        assert got is None
        return
    prec = [sum(hit[:i + 1]) / (i + 1) for i in range(len(hit))]
    want = sum(max(prec[i:]) for i in range(len(hit)) if hit[i]) / n
    assert got == pytest.approx(want, abs=1e-12)


def small(**change):
    js = dict(images=[dict(id=7, movie="m", timestamp=2, width=48, height=32)],
              annotations=[dict(id=1, image_id=7, bbox=[4, 4, 20, 20], action_ids=[1, 2])])
    js.update(change)
    return js


@pytest.mark.parametrize("js,what", [
    (small(annotations=[dict(id=1, image_id=8, bbox=[1, 1, 2, 2], action_ids=[1])]), "annotation 1 .*no image has"),
    (small(annotations=[dict(id=1, image_id=7, bbox=[1, 1, 2], action_ids=[1])]), "annotation 1 .*4 numbers"),
    (small(annotations=[dict(id=1, image_id=7, bbox=[1, 1, 2, 2], action_ids=[0])]), "action 0 is not"),
    (small(annotations=[dict(id=1, image_id=7, bbox=[1, 1, 2, 2], action_ids=[81])]), "action 81 is not"),
    (small(annotations=[dict(id=1, image_id=7, bbox=[1, 1, 2, 2], action_ids="1")]), "no list of action ids"),
    (small(images=[dict(id=7, file_name="no_second.jpg", width=4, height=4)]), "image 1 .*finds no movie"),
    (small(images=[dict(id=7, movie="m", timestamp=2)]), "image 1 .*no size"),
    (small(images=3), "no list 'images'"),
])
def test_bad_annotations_name_the_row(tmp_path, js, what):
    p = tmp_path / "a.json"
    p.write_text(json.dumps(js))
    with pytest.raises(InputError, match=what) as e:
        read_annotations(p, {1: "a", 2: "b"})
    assert str(p) in str(e.value)


def test_boxes_that_are_empty_or_outside_are_noted():
    js = small(annotations=[dict(id=1, image_id=7, bbox=[60, 4, 20, 20], action_ids=[1]),
                            dict(id=2, image_id=7, bbox=[4, 4, 0, 20], action_ids=[1]),
                            dict(id=3, image_id=7, bbox=[4, 4, 9, 9], action_ids=[2])])
    data = read_annotations(js, {1: "a", 2: "b"})
    assert data.frames[0].actions == [(2,)] and "2 empty boxes" in data.notes[0]
    with pytest.raises(InputError, match="row 1"):
        add_boxes(data, [dict(image_id=7, bbox=[1, 2, 3, float("nan")], score=1)])
    with pytest.raises(InputError, match="two sets"):
        add_objects(data, [dict(image_id=9, bbox=[1, 2, 3, 4], score=1)])


def test_nobody_on_a_clip_by_option(tmp_path):
    data = read_annotations(small(), {1: "a", 2: "b"})
    add_boxes(data, [dict(image_id=7, bbox=[4, 4, 20, 20], score=.5)])  # below 0.8
    write_film(tmp_path / "m.mp4", GREY)
    films = Films(tmp_path)
    assert len(ActionClips(data, films, ClipRule(short=32))) == 0
    clips = ActionClips(data, films, ClipRule(short=32), keep_empty=True)
    assert len(clips) == 1 and clips[0]["boxes"].shape == (0, 4)
    assert "nobody" in check_set(data, films, ClipRule(), train=False)[0]["what"]


def test_flip_mirrors_people_objects_and_pixels(tmp_path):
    data = read_annotations(small(), {1: "a", 2: "b"})
    add_objects(data, [dict(image_id=7, bbox=[2, 2, 6, 6], score=.5)])
    rng = np.random.default_rng(0)
    write_film(tmp_path / "m.mp4", [rng.integers(0, 255, (32, 48, 3)).astype(np.uint8) for _ in range(100)])
    clips = ActionClips(data, Films(tmp_path), ClipRule(short=32), train=True)
    a, b = clips.item(0, Draw()), clips.item(0, Draw(flip=True))
    np.testing.assert_array_equal(a["fast"][..., ::-1], b["fast"])
    for k in ("boxes", "objects"):
        np.testing.assert_allclose(48 - a[k][:, 2] - 1, b[k][:, 0])


@pytest.mark.parametrize("text,line,what", [
    ("m,1,0,0,.5,.5,1,.9\nm,1,0,0,.5\n", 2, "5 columns"),
    ("m,1,0,0,.5,.5,1,.9\n\nm,1,0,0,.5,.5,1,\n", 3, "score is missing"),
    ("m,1,0,0,.5,.5\n", 1, "6 columns"),
])
def test_result_csv_names_the_line(tmp_path, text, line, what):
    p = tmp_path / "r.csv"
    p.write_bytes(text.replace("\n", "\r\n").encode())
    with pytest.raises(InputError, match=what) as e:
        frame_map(ava_rows("m", 1, [[0, 0, .5, .5]], 1), p, {1: "a"})
    assert e.value.line == line


def test_groups_of_ava_are_known(shared):
    names = read_labelmap(shared / "realdata/ava_lists/ava_action_list_v2.2.pbtxt")
    assert [len(i) for *_, i in group_classes(names)] == [14, 49, 17]
    with pytest.raises(InputError, match="two groups"):
        group_classes({1: "a", 2: "b"}, dict(posture=["a"], other=["a"]))


def test_open_frames_refuses_what_is_no_film(tmp_path):
    (tmp_path / "x.mp4").write_text("no film")
    with pytest.raises(InputError, match="x.mp4"):
        open_frames(tmp_path / "x.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        Pictures(tmp_path / "empty")
    with pytest.raises(InputError, match="leaves its folder"):
        Films(tmp_path)("../secret")
    assert SetFiles().annotations == "" and av.__version__
