"""Golden checks of detection figures, box fusion and the challenge's files."""
import numpy as np

from crowdlens.core import fisheye_challenge as challenge
from crowdlens.core import fusion
from crowdlens.metrics import detection, f1
from crowdlens.metrics.tables import read_detections, read_ground_truth
from goldenkit import case

COCO = dict(AP="map", AP50="map_50", AP75="map_75", APs="map_small", APm="map_medium", APl="map_large",
            AR1="mar_1", AR10="mar_10", AR100="mar_100", ARs="mar_small", ARm="mar_medium", ARl="mar_large")


def absent(x):
    "None for -1, the mark of a figure without ground truth."
    return {k: None if v == -1 else v for k, v in x.items()}


@case("dfine", "detection-metrics")
def metrics(c, path):
    tol = c["tolerance"]
    files = [str(path.parent / c[k]) for k in ("ground_truth", "predictions")]
    want = dict(c["dfine_validator"])
    conf, iou = want.pop("conf_thresh"), want.pop("iou_thresh")
    rep = detection.f1_report(*files, conf_thr=conf, iou_thr=iou)
    val = rep["validator"]
    got = dict(per_class=val["per_class"], sweep=val["sweep"], best_threshold=val["best_threshold"],
               confusion_matrix=dict(classes=val["classes"], rows_are_truth=val["confusion"]))
    for k in want:
        yield f"validator {k}", got[k] if k in got else rep[k], want[k], tol
    want = c["aicity_track4"]
    gt = read_ground_truth(files[0])
    det = read_detections(files[1], gt)
    ch = rep["challenge"]
    cut = {t: detection.f1_report(gt, det.of(det.scores >= float(t)))["f1_challenge"]
           for t in want.get("f1_if_submitted_with_threshold", {})}
    got = dict(f1=rep["f1_challenge"], f1_per_class=ch["per_class"], f1_per_iou=ch["per_iou"],
               iou_thresholds=ch["ious"], f1_if_submitted_with_threshold=cut, stats=stats(gt, det, ch))
    for k in want:
        yield f"challenge {k}", got[k], absent(want[k]) if k == "stats" else want[k], tol
    flat = detection.evaluate(*files)
    want = absent(c["coco_standard"])
    yield "coco", {k: flat[COCO[k]] for k in want}, want, tol


def stats(gt, det, ch):
    "The challenge's 24 figures: COCO's with its own sizes, and P and F1."
    p, r = detection.curves(gt, det, areas=f1.AREAS)
    mean = detection._mean
    out = dict(mAP_50_95=mean(p[..., 0, 2]), mAP_50=mean(p[0, ..., 0, 2]), mAP_75=mean(p[5, ..., 0, 2]))
    for i, cap in enumerate((1, 10, 100)):
        out[f"AR_{cap}"] = mean(r[:, :, 0, i])
    for a, (size, name) in enumerate(dict(small="small64", medium="medium192", large="large").items(), 1):
        out[f"mAP_{name}"] = mean(p[..., a, 2])
        out[f"AR_{size}"] = mean(r[:, :, a, 2])
    return out | {k: v for k, v in ch.items() if k[:2] == "P_" or k[:3] == "F1_"}


@case("dfine", "wbf")
def wbf(c, path):
    for one in c["cases"]:
        kind = one.get("method", "wbf")
        call = dict(wbf=fusion.wbf, nms=fusion.nms)[kind]
        got = call(one["boxes_list"], one["scores_list"], one["labels_list"], **one["kwargs"])
        for k, g in zip(("boxes", "scores", "labels"), got):
            want = np.asarray(one[k], float).reshape(np.shape(g) if not one[k] else np.shape(one[k]))
            yield f"{one['name']} {k}", g, want, c["tolerance"]
    if "pseudo_labels" not in c:
        return
    p = c["pseudo_labels"]
    q = dict(p["parameters"])
    got = fusion.pseudo_labels(p["inputs"], skip_thr=q.pop("skip_box_thr"), **q)
    want = p["output_annotations"]
    order = lambda rows: sorted(rows, key=lambda r: (r["image_id"], r["category_id"], -r["score"], r["bbox"]))
    got, want = order(got), order(want)
    yield "pseudo labels, boxes", [r["bbox"] for r in got], [r["bbox"] for r in want], 1e-3
    rest = lambda rows: [{k: v for k, v in r.items() if k != "bbox"} for r in rows]
    yield "pseudo labels", rest(got), rest(want), c["tolerance"]


@case("dfine", "submission")
def submission(c, path):
    ids = {n: challenge.image_id(n) for n in c["image_ids"]}
    yield "image ids", ids, c["image_ids"], 0
    low = {k: v for k, v in c["thresholds"].items() if k != "rule"}
    names = {d["image"]: challenge.image_id(d["image"]) for d in c["detections"]}
    got = challenge.submission(c["detections"], low, ids=names)
    yield "submission", got, c["submission"], 0
    for s in c["score_examples"]:
        got = challenge.challenge_score(s["f1"], s["fps"], s["max_fps"])
        yield f"score of f1 {s['f1']}, {s['fps']} fps", got, s["score"], 0
        yield f"speed of {s['fps']} fps", min(s["fps"], s["max_fps"]) / s["max_fps"], s["normalized_fps"], 0
