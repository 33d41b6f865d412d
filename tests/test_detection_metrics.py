"""Detection figures against pycocotools, torchmetrics and slow plain rules."""
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from crowdlens.core import fusion
from crowdlens.core.files import InputError
from crowdlens.metrics import crowds, detection
from crowdlens.metrics.f1 import best_thresholds, challenge_f1
from crowdlens.metrics.matching import largest_matching, overlaps
from crowdlens.metrics.tables import group, read_detections, read_ground_truth

COCO = dict(AP="map", AP50="map_50", AP75="map_75", APsmall="map_small", APmedium="map_medium", APlarge="map_large",
            AR1="mar_1", AR10="mar_10", AR100="mar_100", ARsmall="mar_small", ARmedium="mar_medium",
            ARlarge="mar_large")


def scene(seed, images=6, most=14, dets=40, classes=3, grid=4, crowd=0.15):
    "Ground truth and results on a coarse grid: ties, duplicates, regions, empty images."
    r = np.random.default_rng(seed)
    ids = r.permutation(50)[:images].tolist()
    cats = r.permutation(9)[:classes].tolist()
    gt = dict(images=[dict(id=i, width=400, height=300) for i in ids],
              categories=[dict(id=c, name=f"c{c}") for c in cats], annotations=[])
    res = []
    for i in ids:
        for _ in range(r.integers(0, most)):
            b = (r.integers(0, 20, 2) * grid).tolist() + (r.integers(1, 30, 2) * grid).tolist()
            gt["annotations"].append(dict(id=len(gt["annotations"]), image_id=i, bbox=b, area=b[2] * b[3] * 0.7,
                                          category_id=int(r.choice(cats)), iscrowd=int(r.random() < crowd)))
            for _ in range(r.integers(0, 4)):
                e = (np.array(b) + r.integers(-1, 2, 4) * grid * (r.random() < 0.7)).clip(0).tolist()
                res.append(dict(image_id=i, category_id=int(r.choice(cats)), bbox=e, score=float(r.integers(0, 11) / 10)))
        for _ in range(r.integers(0, dets)):
            b = (r.integers(0, 20, 2) * grid).tolist() + (r.integers(0, 30, 2) * grid).tolist()
            res.append(dict(image_id=i, category_id=int(r.choice(cats)), bbox=b, score=float(r.random())))
    order = r.permutation(len(res))
    return gt, [res[i] for i in order]


def same(a, b, tol):
    assert set(a) == set(b)
    for k in a:
        assert (a[k] is None) == (b[k] is None), (k, a[k], b[k])
        assert a[k] is None or abs(a[k] - b[k]) <= tol, (k, a[k], b[k])


@pytest.mark.parametrize("folder,results", [("cocoeval_fake100", "instances_val2014_fakebbox100_results.json"),
                                            ("voc_formats", "coco_dets.json")])
def test_known_figures(shared, folder, results):
    "Published figures; the second pair is joined by file and class names."
    f = shared / "realdata" / folder
    gt = f / ("coco_gt.json" if folder == "voc_formats" else "instances_val2014_100.json")
    got = detection.evaluate(gt, f / results)
    for k, v in json.loads((f / "expected_bbox.json").read_text()).items():
        assert abs(got[COCO[k]] - v) < 1e-5, k
    judge = detection.evaluate(gt, f / results, backend="pycocotools")
    same(got, judge, 1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([(1, 10, 100), (1, 3, 7), (5,), (1, 10, 300), (2, 4, 8, 16)]))
def test_equals_pycocotools(seed, caps):
    "Ties, regions, duplicates, zero sizes, odd caps: all keys within 1e-6."
    gt, res = scene(seed)
    same(detection.evaluate(gt, res, caps), detection.evaluate(gt, res, caps, backend="pycocotools"), 1e-6)


def test_more_than_a_hundred():
    "Beyond the cap of 100 the figures differ, and still equal pycocotools'."
    gt, res = scene(3, images=2, most=300, dets=600, classes=2)
    got = detection.evaluate(gt, res)
    same(got, detection.evaluate(gt, res, backend="pycocotools"), 1e-6)
    assert got["mar_500"] > got["mar_100"] and got["map_500"] > got["map"]


def test_classes_may_go_through_in_parts():
    "A large set is evaluated some classes at a time: the same table."
    gt, res = scene(8, classes=7)
    gt = read_ground_truth(gt)
    det = read_detections(res, gt)
    whole = detection._hotcoco(gt, det, (1, 10, 100), detection.AREAS)
    for most in (1, 30, 90):
        for a, b in zip(whole, detection._hotcoco(gt, det, (1, 10, 100), detection.AREAS, most)):
            assert (a == b).all()


def test_equals_torchmetrics():
    pytest.importorskip("torchmetrics")
    for seed in (1, 2):
        gt, res = scene(seed, images=12)
        want = detection.evaluate(gt, res, backend="torchmetrics")
        got = detection.evaluate(gt, res)
        assert {"map", "map_50", "mar_100", "map_large", "mar_300", "mar_500", "mr2"} <= set(want)
        same({k: got[k] for k in want if k in got}, {k: v for k, v in want.items() if k in got}, 1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_figures_do_not_depend_on_order(seed):
    gt, res = scene(seed)
    res = [r | dict(score=round(i / (len(res) + 1), 6)) for i, r in enumerate(res)]  # no ties
    a = detection.evaluate(gt, res)
    same(a, detection.evaluate(gt, res[::-1]), 0)
    assert a == detection.evaluate(dict(gt, images=gt["images"][::-1]), res)


def plain_iou(a, b, crowd=False):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - w * h)


def plain_mr(gt, res, cat):
    "MR^-2 by the words of the paper: plain loops over dictionaries."
    rows, people = [], 0
    for im in sorted(i["id"] for i in gt["images"]):
        objs = [a for a in gt["annotations"] if a["image_id"] == im and a["category_id"] == cat]
        real = [a for a in objs if not a["iscrowd"]]
        people += len(real)
        used = set()
        dets = sorted((r for r in res if r["image_id"] == im and r["category_id"] == cat), key=lambda r: -r["score"])
        for d in dets:
            free = [(plain_iou(d["bbox"], a["bbox"]), -k) for k, a in enumerate(real) if k not in used]
            best = max(free, default=(0, 0))
            if best[0] > 0.5:
                used.add(-best[1])
                rows.append((d["score"], 1))
            elif not any(plain_iou(d["bbox"], a["bbox"], True) > 0.5 for a in objs if a["iscrowd"]):
                rows.append((d["score"], 0))
    if not people:
        return None
    rows.sort(key=lambda r: -r[0])
    tp = fp = 0
    curve = []
    for _, hit in rows:
        tp, fp = tp + hit, fp + (not hit)
        curve.append((fp / len(gt["images"]), 1 - tp / people))
    out = []
    for ref in (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0):
        out.append(next((m for f, m in curve if f >= ref), curve[-1][1] if curve else 1.0))
    return float(np.exp(np.mean(np.log(out)))) if min(out) > 0 else 0.0


def plain_ji(gt, res, cat):
    "The Jaccard index with SciPy's matching, threshold by threshold."
    best = None
    for t in range(10):
        got = []
        for im in gt["images"]:
            objs = [a for a in gt["annotations"] if a["image_id"] == im["id"] and a["category_id"] == cat]
            real = [a["bbox"] for a in objs if not a["iscrowd"]]
            dets = [r["bbox"] for r in res if (r["image_id"], r["category_id"]) == (im["id"], cat) and r["score"] > t / 10]
            k = 0
            if real and dets:
                near = np.array([[plain_iou(d, o) >= 0.5 for o in real] for d in dets])
                k = int((maximum_bipartite_matching(csr_matrix(near), perm_type="row") >= 0).sum())
            if real or dets:
                got.append(k / (len(real) + len(dets) - k))
        if got:
            best = max(best or 0, np.mean(got))
    return best


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_crowd_scores_equal_plain_rules(seed):
    "MR^-2 with regions; the Jaccard index without, where it has one answer."
    gt, res = scene(seed, crowd=0.2)
    res = [r | dict(score=min(r["score"] + i * 1e-9, 1.0)) for i, r in enumerate(res)]  # no ties
    got = crowds.crowd_scores(*(lambda g: (g, read_detections(res, g)))(read_ground_truth(gt)))
    for c in gt["categories"]:
        want = plain_mr(gt, res, c["id"])
        have = got[f"mr2/{c['name']}"]
        assert (have is None) == (want is None) and (want is None or abs(have - want) < 1e-9)
    gt["annotations"] = [a for a in gt["annotations"] if not a["iscrowd"]]
    got = crowds.crowd_scores(*(lambda g: (g, read_detections(res, g)))(read_ground_truth(gt)))
    for c in gt["categories"]:
        if got[f"ji/{c['name']}"] is not None:
            assert abs(got[f"ji/{c['name']}"] - plain_ji(gt, res, c["id"])) < 1e-9


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(0, 15), st.integers(0, 15), st.floats(0, 0.6))
def test_matching_is_largest(seed, n, m, p):
    near = np.random.default_rng(seed).random((n, m)) < p
    mine = largest_matching(near)
    k = int((mine >= 0).sum())
    want = int((maximum_bipartite_matching(csr_matrix(near), perm_type="row") >= 0).sum()) if near.any() else 0
    assert k == want and len(set(mine[mine >= 0])) == k
    assert all(near[i, j] for j, i in enumerate(mine) if i >= 0)


def test_overlap_equals_pycocotools():
    from pycocotools import mask
    r = np.random.default_rng(0)
    a, b = (np.column_stack([r.uniform(0, 50, (60, 2)), r.uniform(0.1, 40, (60, 2))]) for _ in range(2))
    for crowd in (0, 1):
        want = mask.iou(a, b, [crowd] * 60)
        assert (overlaps(a, b, np.full(60, bool(crowd))) == want).all()


def test_thresholds_are_the_best_by_search():
    "No other threshold of a class gives the challenge's F1 more."
    gt, res = scene(5, images=10, crowd=0)
    gt = read_ground_truth(gt)
    det = read_detections(res, gt)
    best = best_thresholds(gt, det)
    for c, name in enumerate(gt.names):
        tries = [challenge_f1(gt, det.of((det.cat != c) | (det.scores >= t)))["per_class"][name]
                 for t in np.unique(det.scores[det.cat == c])]
        assert abs(max(tries) - best[name]["f1"]) < 1e-9


BAD_GT = {
    "no images": lambda g: g.pop("images"), "no categories": lambda g: g.pop("categories"),
    "dangling image": lambda g: g["annotations"][0].update(image_id=999),
    "dangling category": lambda g: g["annotations"][0].update(category_id=999),
    "image twice": lambda g: g["images"].append(g["images"][0]),
    "category twice": lambda g: g["categories"].append(g["categories"][0]),
    "annotation twice": lambda g: g["annotations"].append(g["annotations"][0]),
    "box of text": lambda g: g["annotations"][0].update(bbox="abcd"),
    "box of three": lambda g: g["annotations"][0].update(bbox=[1, 2, 3]),
    "box infinite": lambda g: g["annotations"][0].update(bbox=[0, 0, float("inf"), 1]),
    "no box": lambda g: g["annotations"][0].pop("bbox"),
    "area of text": lambda g: g["annotations"][0].update(area="x"),
    "a number for an annotation": lambda g: g["annotations"].append(3),
    "images of text": lambda g: g.update(images=["a.jpg"]),
}
BAD_RES = {
    "unknown image": dict(image_id=999), "unknown category": dict(category_id=999), "NaN": dict(score=float("nan")),
    "infinite": dict(score=float("inf")), "percent": dict(score=90.0), "negative score": dict(score=-0.1),
    "no number": dict(score="0.9"), "None": dict(score=None), "negative width": dict(bbox=[0, 0, -3, 4]),
    "NaN box": dict(bbox=[0, float("nan"), 3, 4]), "ragged": dict(bbox=[1, 2, 3]), "no box": dict(bbox=None), "box of texts": dict(bbox=["1", "2", "3", "4"]),
    "id of text": dict(image_id="1"), "fraction": dict(image_id=1.5),
}


@pytest.mark.parametrize("name", BAD_GT)
def test_bad_ground_truth(name, tmp_path):
    gt, res = scene(1)
    BAD_GT[name](gt)
    with pytest.raises(InputError):
        detection.evaluate(gt, res)
    p = tmp_path / "gt.json"
    p.write_text(json.dumps(gt))
    with pytest.raises(InputError, match="gt.json"):
        detection.f1_report(p, [])


@pytest.mark.parametrize("name", BAD_RES)
def test_bad_results(name, tmp_path):
    gt, res = scene(1)
    res[3] = res[3] | BAD_RES[name]
    with pytest.raises(InputError, match="result 3"):
        detection.evaluate(gt, res)
    p = tmp_path / "r.json"
    p.write_text(json.dumps(res))
    with pytest.raises(InputError, match="r.json: result 3"):
        detection.evaluate(gt, p)
    del res[3]["score"], res[3]["image_id"]
    with pytest.raises(InputError, match="image_id"):
        detection.evaluate(gt, res)


def test_bad_files(tmp_path):
    gt, res = scene(1)
    for text, why in (("", "not JSON"), ("[1", "not JSON"), ('{"a":1}', "annotations"), ("3", "list")):
        p = tmp_path / "x.json"
        p.write_text(text)
        with pytest.raises(InputError, match=why):
            detection.evaluate(gt, p)
    with pytest.raises(InputError, match="no such file"):
        detection.evaluate(tmp_path / "absent.json", res)
    with pytest.raises(InputError, match="folder"):
        detection.evaluate(tmp_path, res)


def test_empty_sides():
    "No results: zeros. No objects: None. No images: None."
    gt, res = scene(1, crowd=0)
    got = detection.evaluate(gt, [])
    assert got["map"] == got["mar_500"] == got["ji"] == 0 and got["mr2"] == 1
    for g in (dict(gt, annotations=[]), dict(images=[], annotations=[], categories=[])):
        r = res if g["images"] else []
        assert set(detection.evaluate(g, r).values()) == {None}
        rep = detection.f1_report(g, r)
        assert rep["f1"] == 0 and rep["f1_challenge"] is None


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(fusion.CONF), st.booleans())
def test_files_fuse_as_single_images_do(seed, kind, overflow):
    "`fuse` over many images equals `wbf` of each image."
    r = np.random.default_rng(seed)
    sizes = {int(i): (200, 100) for i in r.permutation(90)[:4]}
    models = [[dict(image_id=int(r.choice(list(sizes))), category_id=int(r.integers(0, 3)),
                    bbox=[*r.uniform(0, 60, 2).tolist(), *r.uniform(5, 40, 2).tolist()], score=float(r.random()))
               for _ in range(r.integers(0, 40))] for _ in range(3)]
    kw = dict(weights=[1, 2, 1], conf_type=kind, allows_overflow=overflow)
    got = fusion.fuse(models, sizes=sizes, iou_thr=0.4, skip_thr=0.1, **kw)
    for i, (w, h) in sizes.items():
        rows = [[d for d in m if d["image_id"] == i] for m in models]
        xyxy = [[np.array([x, y, x + bw, y + bh]) / [w, h, w, h] for x, y, bw, bh in (d["bbox"] for d in m)] for m in rows]
        box, conf, lab = fusion.wbf(xyxy, [[d["score"] for d in m] for m in rows],
                                    [[d["category_id"] for d in m] for m in rows], iou_thr=0.4, skip_box_thr=0.1, **kw)
        mine = [d for d in got if d["image_id"] == i]
        assert [d["score"] for d in mine] == conf.tolist()
        assert [d["category_id"] for d in mine] == lab.tolist()
        want = np.hstack([box[:, :2], box[:, 2:] - box[:, :2]]) * [w, h, w, h]
        assert np.allclose(np.array([d["bbox"] for d in mine]).reshape(-1, 4), want, atol=1e-9)


def plain_wbf(boxes, scores, labels, iou_thr):
    "Fusion of equal models, by the paper's words, in float64."
    out = []
    for lab in sorted(set(itertools.chain(*labels))):
        rows = sorted(((s, b) for B, S, L in zip(boxes, scores, labels) for b, s, l in zip(B, S, L) if l == lab),
                      key=lambda r: -r[0])
        heaps = []
        for s, b in rows:
            def mean(h):
                return np.average([x[1] for x in h], axis=0, weights=[x[0] for x in h])
            def iou(p, q):
                return plain_iou([*p[:2], *(np.array(p[2:]) - p[:2])], [*q[:2], *(np.array(q[2:]) - q[:2])])
            ious = [iou(mean(h), b) for h in heaps]
            if ious and max(ious) > iou_thr:
                heaps[int(np.argmax(ious))].append((s, b))
            else:
                heaps.append([(s, b)])
        out += [(np.mean([x[0] for x in h]) * min(len(h), len(boxes)) / len(boxes), lab, mean(h)) for h in heaps]
    return sorted(out, key=lambda r: -r[0])


def test_fusion_equals_the_plain_rule():
    r = np.random.default_rng(4)
    for _ in range(20):
        lists = []
        for _ in range(3):
            lo = r.uniform(0, 0.6, (12, 2))
            lists.append((np.hstack([lo, lo + r.uniform(0.1, 0.4, (12, 2))]), r.random(12), r.integers(0, 2, 12)))
        box, conf, lab = fusion.wbf(*zip(*lists), iou_thr=0.5)
        want = plain_wbf(*zip(*lists), 0.5)
        assert np.allclose(conf, [w[0] for w in want], atol=1e-6) and lab.tolist() == [w[1] for w in want]
        assert np.allclose(box, [w[2] for w in want], atol=1e-5)


def test_groups_hold_every_box_once():
    gt, res = scene(9)
    gt = read_ground_truth(gt)
    det = read_detections(res, gt)
    g = group(gt, det)
    assert sorted(g.det) == list(range(len(det))) and sorted(g.obj) == list(range(len(gt)))
    for a, b in zip(g.det_start, g.det_start[1:]):
        assert (np.diff(det.scores[g.det[a:b]]) <= 0).all()


def test_threads_change_nothing(monkeypatch):
    "Many boxes are fused by several threads: the same result."
    r = np.random.default_rng(0)
    models = [[dict(image_id=i, category_id=int(c), score=float(s), bbox=b.tolist()) for i in range(40)
               for c, s, b in zip(r.integers(0, 3, 200), r.random(200), r.uniform(1, 50, (200, 4)))] for _ in range(3)]
    sizes = dict.fromkeys(range(40), (100, 100))
    got = []
    for n in (1, 4):
        monkeypatch.setattr(fusion.os, "cpu_count", lambda n=n: n)
        got.append(fusion.fuse(models, sizes=sizes))
    assert got[0] == got[1] and len(got[0]) > 1000
