"""Golden checks of action data and scores: clips, boxes, lists, frame-mAP."""
import re

import numpy as np

from crowdlens.core import action_boxes as ab
from crowdlens.core.ava import read_ava, read_excluded, read_labelmap
from crowdlens.metrics import actions
from goldenkit import case


@case("slowfast", "ava_eval")
def ava_eval(c, path):
    tol = c["tolerance"]["absolute"]
    top = path.parent
    excluded = top / "excluded_timestamps.csv"
    for dialect in ("item", "label"):
        rows = actions.frame_ap(top / "gt.csv", top / "detections.csv", top / f"label_map_{dialect}.pbtxt",
                                excluded if excluded.exists() else None)
        yield f"{dialect}: mAP", actions.figures(rows)["map_50"], c["mAP"], tol
        yield f"{dialect}: official keys", actions.official(rows), c["official_keys"], tol
        yield f"{dialect}: per class", rows, c["per_class"], tol


@case("slowfast", "boxes")
def boxes(c, path):
    tol = c["tolerance"]["pixels"]
    size = c["image_size_wh"]
    xyxy = ab.from_xywh(c["xywh"])
    yield "to_xyxy", xyxy.tolist(), c["to_xyxy"], tol
    clipped, _ = ab.clip_boxes(xyxy, size)
    yield "clipped_non_empty", clipped.tolist(), c["clipped_non_empty"], tol
    wh = lambda name: tuple(map(int, re.search(r"(\d+)x(\d+)$", name).groups()))
    scaled = {}
    for k in c:
        if k.startswith("resized_"):
            scaled[wh(k)] = ab.scale_boxes(clipped, size, wh(k))
            yield k, scaled[wh(k)].tolist(), c[k], tol
    for k in c:
        if k.startswith("extended_"):
            by = [float(v.replace("p", ".")) for v in re.match(r"extended_(\d+p\d+)_(\d+p\d+)_", k).groups()]
            yield k, ab.extend_boxes(scaled[wh(k)], wh(k), by).tolist(), c[k], tol
        elif k.startswith("flipped_"):
            yield k, ab.flip_boxes(scaled[wh(k)], wh(k)[0]).tolist(), c[k], tol
    for k, want in c["jitter"].items():
        if k.startswith("result_on_"):
            yield f"jitter {k}", ab.jitter_boxes(scaled[wh(k)], wh(k), np.array(c["jitter"]["u"])).tolist(), want, tol
    top = c["top_k"]
    got, s = ab.top_boxes(clipped, top["scores"], top["k"])
    yield "top_k boxes", got.tolist(), top["boxes"], tol
    yield "top_k scores", s.tolist(), top["scores_out"], 1e-7
