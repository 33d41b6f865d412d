"""det_db, sequences, calibration and stability beyond what the notebooks show."""
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from crowdlens.core import det_db as D
from crowdlens.core import score_calibration as C
from crowdlens.core.files import InputError
from crowdlens.core.mot import mot_rows, read_mot, save_mot
from crowdlens.core.track_data import check_truth, convert_to_gt, find_sequences, open_sequence
from crowdlens.core.track_stability import stability, track_table

KEY = "train/game/img1/00000001.txt"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-50, 2000)] * 2, *[st.floats(0, 500)] * 2, st.floats(0, 1)), max_size=12))
def test_det_db_round_trip(tmp_path_factory, rows):
    p = tmp_path_factory.mktemp("db") / "d.json"
    rows = np.array(rows, float).reshape(-1, 5)
    D.write_det_db(p, {KEY: rows, "empty/img1/1.txt": np.empty((0, 5))})
    back = D.read_det_db(p)
    np.testing.assert_allclose(back[KEY], rows, atol=.0051)
    assert len(back["empty/img1/1.txt"]) == 0
    assert all(len(t.split(",")) == 5 for t in json.loads(p.read_text())[KEY])


@pytest.mark.parametrize("text,word", [
    ('[1]', "no JSON"), ('{"a": 1', "not JSON"), ('{"x/img1/1.txt": 3}', "not a list"),
    ('{"x.jpg": []}', "names no frame"), ('{"../x/img1/1.txt": []}', "names no frame"),
    ('{"x/img1/1.txt": ["1,2,3,4,0.5,0"]}', "not 5 numbers"), ('{"x/img1/1.txt": ["1,2,3,4,inf"]}', "NaN"),
    ('{"x/img1/1.txt": ["1,2,-3,4,.5"]}', "negative"), ('{"x/img1/1.txt": ["1,2,3,4,117"]}', "outside 0..1")])
def test_faulty_det_db(tmp_path, text, word):
    p = tmp_path / "d.json"
    p.write_text(text)
    with pytest.raises(InputError, match=word) as e:
        D.read_det_db(p)
    assert e.value.path is not None


def test_six_numbers_by_option(tmp_path):
    p = tmp_path / "d.json"
    p.write_text('{"x/img1/1.txt": ["1,2,3,4,0.5,0", "9,2,3,4,0.5,1"]}')
    assert D.read_det_db(p, keep_class=0)["x/img1/1.txt"].tolist() == [[1, 2, 3, 4, .5]]


def test_order_is_kept(tmp_path):
    rows = np.array([[0, 0, 5, 5, .1], [50, 0, 5, 5, .9], [90, 0, 5, 5, .5]])
    D.write_det_db(tmp_path / "d.json", {KEY: rows})
    assert D.read_det_db(tmp_path / "d.json")[KEY][:, 4].tolist() == [.1, .9, .5]


def test_tud_scores_need_a_rule(shared):
    top = shared / "realdata/mot_tud_stadtmitte/TUD-Stadtmitte"
    det = read_mot(top / "det/det.txt")
    with pytest.raises(InputError, match="name a rule|outside"):
        D.from_mot("tud", det, 179)
    db = D.from_mot("tud", det, 179, "rank")
    s = C.scores_of(db)
    assert len(db) == 179 and len(s) == 1129 and 0 < s.min() and s.max() == 1
    assert np.corrcoef(np.argsort(np.argsort(det.conf)), np.argsort(np.argsort(np.concatenate(
        [db[k][:, 4] for k in sorted(db)]))))[0, 1] > .9


def test_real_sequences_open(shared):
    top = shared / "realdata"
    got = {s.name: len(s) for s in find_sequences(top / "mot_volleyball")}
    assert got == {"volleyball_7_38025": 20, "volleyball_7_51725": 20}     # six digits
    assert [len(s) for s in find_sequences(top / "mot17_mini")] == [8, 6]
    tud = open_sequence(top / "mot_tud_stadtmitte/TUD-Stadtmitte")
    assert len(tud) == 179 and tud.fps == 25 and tud.image(1).shape == (480, 640, 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_calibration_is_monotone_and_undoes_a_shift(seed):
    rng = np.random.default_rng(seed)
    s = rng.beta(2, 1.5, 3000)
    db = lambda v: {f"a/img1/{i}.txt": np.c_[np.tile([0, 0, 9, 9], (30, 1)) + np.c_[np.arange(30) * 30, np.zeros((30, 3))],
                                            v[30 * i:30 * i + 30]] for i in range(100)}
    other = lambda v: .05 + .25 * v**2
    for how in ("quantiles", "counts", "pairs"):
        c = C.fit(how, db(other(s)), db(s))
        x = np.linspace(0, 1, 300)
        assert (np.diff(c(x)) >= 0).all() and c(x).min() >= 0 and c(x).max() <= 1
        mid = np.quantile(s, [.2, .5, .8])
        np.testing.assert_allclose(c(other(mid)), mid, atol=.05)


def test_calibration_without_the_other():
    with pytest.raises(InputError, match="needs the other"):
        C.fit("counts", {KEY: np.ones((3, 5))})
    with pytest.raises(InputError, match="no calibration"):
        C.fit("magic", {}, {})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(0, 6))
def test_pseudo_truth_keeps_its_promises(seed, length, fill):
    rng = np.random.default_rng(seed)
    n = 80
    rows = mot_rows(rng.integers(1, 30, n), rng.integers(0, 5, n), rng.uniform(1, 90, (n, 4)), rng.random(n))
    _, first = np.unique(np.c_[rows.frame, rows.id], axis=0, return_index=True)
    rows = rows[np.sort(first)]
    got = convert_to_gt(rows, length, fill, .1)
    assert (got.conf == 1).all() and (got.cls == 1).all()
    ids, count = np.unique(got.id, return_counts=True)
    assert ids.tolist() == list(range(1, len(ids) + 1)) and (count >= length).all()
    for i in ids:
        gaps = np.diff(got.frame[got.id == i]) - 1
        assert ((gaps == 0) | (gaps > fill)).all()


def test_truth_is_checked(shared):
    top = shared / "realdata/mot17_mini/MOT17-04-FRCNN"
    gt = read_mot(top / "gt/gt.txt")
    found = {r["what"]: r["count"] for r in check_truth(gt, 8)}
    assert found.get("rows beyond the last picture", 0) == (gt.frame > 8).sum()


def test_stability_of_a_steady_and_a_restless_tracker():
    f = np.tile(np.arange(1, 41), 3)
    i = np.repeat([1, 2, 3], 40)
    box = np.c_[i * 100. + f, np.zeros(120), np.full(120, 20.), np.full(120, 60.)]
    steady = mot_rows(f, i, box)
    restless = mot_rows(f, i * 100 + f // 8, box + np.random.default_rng(0).normal(0, 3, box.shape))
    a, b = stability(steady), stability(restless)
    assert a["jitter"] < 1e-9 < b["jitter"] and a["tracks a person"] == 1
    assert b["tracks a person"] > 4 and b["short tracks"] == 1 and a["short tracks"] == 0
    assert track_table(steady)["length"].tolist() == [40] * 3
