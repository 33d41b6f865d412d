"""Tracking scores against published figures, a slow textbook implementation,
and other people's code where it is installed."""
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment

from crowdlens.core.files import InputError
from crowdlens.core.mot import mot_rows, read_mot, save_mot
from crowdlens.metrics import tracking as T

SAME = ("HOTA DetA AssA LocA DetRe DetPr AssRe AssPr MOTA MOTP IDSW Frag MT PT "
        "ML IDF1 IDP IDR Dets GT_Dets IDs GT_IDs").split()


def agrees(got, want, names):
    for n in names:
        if n in want:
            assert got[n] == pytest.approx(want[n], abs=1e-5), n


def test_mot17_with_distractors(shared):
    top = shared / "realdata/mot_reference/MOT17"
    want = json.loads((top / "expected/MOT17-09-FRCNN.json").read_text())
    got = T.evaluate(top / "gt", top / "tracker")
    flat = {k.replace("___AUC", ""): v for k, v in want.items()} if "HOTA___AUC" in want else want
    agrees(got, flat, SAME)
    assert got["HOTA"] == pytest.approx(0.651882, abs=1e-6)
    assert got["MOTA"] == pytest.approx(0.880376, abs=1e-6)
    assert got["IDF1"] == pytest.approx(0.739689, abs=1e-6)
    assert (got["GT_Dets"], got["GT_IDs"], got["Dets"]) == (5325, 26, 5174)


def test_distractors_of_mot17_are_forgiven(shared, tmp_path):
    top = shared / "realdata/mot17_mini"
    for d in ("MOT17-04-FRCNN", "MOT17-05-FRCNN"):
        gt = read_mot(top / d / "gt/gt.txt")
        save_mot(tmp_path / f"{d}.txt", gt[np.isin(gt.cls, (1, 2, 7, 8, 12))])
    got, raw = T.evaluate(top, tmp_path), T.evaluate(top, tmp_path, None)
    assert got["MOTA"] == got["HOTA"] == 1 and got["GT_Dets"] == 336 + 45
    assert raw["MOTA"] < 1 and raw["FP"] > 0


def test_tud_both_sequences_and_together(shared, tmp_path):
    top = shared / "realdata/mot_reference/TUD"
    for seq in ("TUD-Campus", "TUD-Stadtmitte"):
        shutil.copy(top / seq / "test.txt", tmp_path / f"{seq}.txt")
    want = json.loads((top / "expected.json").read_text())["computed_trackeval"]
    for how in ("mot", None):
        got = T.evaluate(top, tmp_path, how)
        agrees(got, want["COMBINED_SEQ"], SAME)
        for seq in ("TUD-Campus", "TUD-Stadtmitte"):
            agrees({k: got[f"{seq}/{k}"] for k in SAME}, want[seq], SAME)


def test_tud_stadtmitte_sequence_folder(shared):
    top = shared / "realdata/mot_tud_stadtmitte"
    want = json.loads((top / "tracker/expected.json").read_text())
    got = T.evaluate(top, top / "tracker")
    agrees(got, want["computed_trackeval"], SAME)


def tracks(seed, frames=12, ids=5, hole=.2, shift=4.):
    "Truth and a tracker with jitter, holes, switches and false alarms."
    rng = np.random.default_rng(seed)
    f, i = [x.ravel() for x in np.meshgrid(np.arange(1, frames + 1), np.arange(ids))]
    pos = rng.uniform(0, 60, (ids, 2))[i] + rng.normal(0, 2, (ids, 2))[i] * f[:, None]
    box = np.c_[pos, np.full(len(f), 20.), np.full(len(f), 30.)]
    keep = rng.random(len(f)) > hole
    gt = mot_rows(f[keep], i[keep] + 1, box[keep])
    seen = rng.random(len(f)) > hole
    name = np.where(f > rng.integers(2, frames + 2), (i + 1) % ids, i) + 50
    tr = mot_rows(f[seen], name[seen], box[seen] + rng.normal(0, shift, (seen.sum(), 4)) * [1, 1, .5, .5])
    return gt, tr


def slow(gt, tr):
    "The papers' definitions, written down without any thought of speed."
    G, D = {n: k for k, n in enumerate(np.unique(gt.id))}, {n: k for k, n in enumerate(np.unique(tr.id))}
    frames = np.union1d(gt.frame, tr.frame)
    S = {f: T.iou_table(gt.at(f).boxes_xywh.copy(), tr.at(f).boxes_xywh.copy()) for f in frames}
    soft = np.zeros((len(G), len(D)))
    hard = soft.copy()
    for f in frames:
        g, t, s = [G[x] for x in gt.at(f).id], [D[x] for x in tr.at(f).id], S[f]
        for a, i in enumerate(g):
            for b, j in enumerate(t):
                den = s[a].sum() + s[:, b].sum() - s[a, b]
                soft[i, j] += s[a, b] / den if den > 0 else 0
                hard[i, j] += s[a, b] >= .5
    ng = np.array([(gt.id == x).sum() for x in G])
    nt = np.array([(tr.id == x).sum() for x in D])
    align = soft / (ng[:, None] + nt - soft)
    got = [[] for _ in range(19)]
    for f in frames:
        g, t, s = [G[x] for x in gt.at(f).id], [D[x] for x in tr.at(f).id], S[f]
        v = np.array([[align[i, j] * s[a, b] for b, j in enumerate(t)] for a, i in enumerate(g)]).reshape(s.shape)
        for a, b in zip(*linear_sum_assignment(-v)):
            for k in range(19):
                if s[a, b] >= (k + 1) * .05 - 1e-12:
                    got[k].append((g[a], t[b]))
    hota, deta = [], []
    for hits in got:
        tp = len(hits)
        det = tp / (len(gt) + len(tr) - tp)
        c = {h: hits.count(h) for h in set(hits)}
        ass = sum(c[h] / (ng[h[0]] + nt[h[1]] - c[h]) for h in hits) / max(1, tp)
        deta.append(det)
        hota.append((det * ass) ** .5)
    r, c = linear_sum_assignment(-hard)
    last, before, hit, idsw = {}, {}, 0, 0
    for f in frames:
        g, t, s = list(gt.at(f).id), list(tr.at(f).id), S[f]
        if not g or not t:
            continue
        v = np.array([[(s[a, b] + 1000 * (before.get(i) == j)) * (s[a, b] >= .5)
                       for b, j in enumerate(t)] for a, i in enumerate(g)])
        before = {g[a]: t[b] for a, b in zip(*linear_sum_assignment(-v)) if v[a, b] > 0}
        idsw += sum(i in last and last[i] != j for i, j in before.items())
        last |= before
        hit += len(before)
    return dict(HOTA=np.mean(hota), DetA=np.mean(deta), IDF1=2 * hard[r, c].sum() / (len(gt) + len(tr)),
                MOTA=(hit - (len(tr) - hit) - idsw) / len(gt), IDSW=idsw)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([.0, .2, .6]), st.sampled_from([1., 4., 9.]))
def test_equals_the_definitions(seed, hole, shift):
    gt, tr = tracks(seed, hole=hole, shift=shift)
    if not len(gt) or not len(tr):
        return
    got = T.figures(T.count(gt, tr))
    for k, v in slow(gt, tr).items():
        assert got[k] == pytest.approx(v, abs=1e-9), k


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_names_and_order_do_not_matter(seed):
    gt, tr = tracks(seed)
    a = T.count(gt, tr)
    rng = np.random.default_rng(seed)
    new = rng.permutation(100)
    b = T.count(mot_rows(gt.frame + 7, new[gt.id], gt.boxes_xywh),
                mot_rows(tr.frame + 7, new[tr.id], tr.boxes_xywh))
    np.testing.assert_allclose(a, b, atol=1e-9)
    self = T.figures(T.count(gt, gt))
    assert self["HOTA"] == self["MOTA"] == self["IDF1"] == 1 and self["IDSW"] == 0


def test_other_peoples_code_agrees():
    ev = pytest.importorskip("trackers.eval")
    for seed in range(4):
        gt, tr = tracks(seed, 40, 9)
        p = T.pair(gt, tr)
        cut = lambda v, at: [v[a:b] for a, b in zip(at, at[1:])]
        g, t = cut(p.gt_id, p.gt_at), cut(p.tr_id, p.tr_at)
        s = [T.iou_table(a, b) for a, b in zip(cut(p.gt, p.gt_at), cut(p.tr, p.tr_at))]
        got = T.figures(T.count(gt, tr))
        want = {**ev.compute_hota_metrics(g, t, s), **ev.compute_clear_metrics(g, t, s),
                **ev.compute_identity_metrics(g, t, s)}
        for k in ("HOTA", "DetA", "AssA", "MOTA", "IDSW", "IDF1", "MT", "PT", "ML", "Frag"):
            assert got[k] == pytest.approx(want[k], abs=1e-9), k


def test_empty_sides():
    gt, tr = tracks(1)
    none = gt[:0]
    f = T.figures(T.count(gt, none))
    assert f["MOTA"] == f["HOTA"] == 0 and f["ML"] == 5 and f["FN"] == len(gt)
    f = T.figures(T.count(none, tr))
    assert f["MOTA"] is None and f["FP"] == len(tr)
    both = T.count(gt, gt) + T.count(none, tr)
    assert T.figures(both)["MOTA"] == pytest.approx(1 - len(tr) / len(gt))
    assert T.figures(T.count(none, none))["HOTA"] is None


@pytest.mark.parametrize("line,word", [
    ("1,1,0,0,5,5,1,1,1\n1,1,9,9,5,5,1,1,1", "twice"), ("0,1,0,0,5,5,1,1,1", "begin at"),
    ("1,1,0,0,nan,5,1,1,1", "NaN"), ("1.5,1,0,0,5,5,1,1,1", "whole"), ("1,1,0,0,5,-5,1,1,1", "negative")])
def test_bad_truth_is_named(tmp_path, line, word):
    p = tmp_path / "s/gt/gt.txt"
    p.parent.mkdir(parents=True)
    p.write_text(line)
    (tmp_path / "r").mkdir()
    (tmp_path / "r/s.txt").touch()
    with pytest.raises(InputError, match=word) as e:
        T.evaluate(tmp_path, tmp_path / "r")
    assert e.value.path is not None and e.value.line


def test_floats_unsorted_and_reused_ids(tmp_path):
    rows = ["9,1,0,0,5,5,1,1,1", "1.0,1.0,0,0,5,5,1,1,1", "2,1,0,0,5,5,1,1,1"]
    p = tmp_path / "s/gt.txt"
    p.parent.mkdir()
    p.write_text("\n".join(rows))
    (tmp_path / "r").mkdir()
    save_mot(tmp_path / "r/s.txt", read_mot(p))
    assert T.evaluate(tmp_path, tmp_path / "r")["HOTA"] == 1
