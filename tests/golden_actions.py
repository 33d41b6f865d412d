"""Golden checks of action data and scores: clips, boxes, lists, frame-mAP."""
import json
import re
import tempfile
from pathlib import Path

import numpy as np

from crowdlens.core import action_boxes as ab
from crowdlens.core import action_data as ad
from crowdlens.core.ava import read_ava, read_excluded, read_labelmap
from crowdlens.core.clips import (HSV_REACH, ClipRule, Draw, Seconds, fit_size, normalise, pick_frames, resize,
                                  shift_hsv)
from crowdlens.metrics import actions
from crowdlens.models.action_yaml import published_matching
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


def frames(seed, t, h, w):
    "The README's frames: coarse blocks and noise from one generator."
    rng = np.random.default_rng(seed)
    c = rng.integers(0, 256, (t // 8, -(-h // 16), -(-w // 16), 3))
    c = c.repeat(8, 0).repeat(16, 1).repeat(16, 2)[:t, :h, :w]
    return ((3 * c + rng.integers(0, 256, (t, h, w, 3))) // 4).astype(np.uint8)


@case("slowfast", "sampling")
def sampling(c, path):
    for key in (k for k in c if re.fullmatch(r"resize_\d+_\d+", k)):
        rule = ClipRule(short=int(key.split("_")[1]), long=int(key.split("_")[2]))
        for r in c[key]:
            got = list(fit_size(r["h"], r["w"], rule))
            quirk = got == [r["w"], r["h"]] and r["h"] != r["w"]  # there the published code swaps width and height
            yield f"{key} of {r['h']}x{r['w']}", got[::-1] if quirk else got, r["cv2_size_wh"], 0
            yield f"{key} of {r['h']}x{r['w']}, swapped there", quirk, r["quirk_swapped"], 0
    for r in c["temporal"]:
        rule = ClipRule(frames=r["frame_num"], rate=r["sample_rate"], tau=r["tau"], alpha=r["alpha"])
        slow, fast = pick_frames(rule, r["raw_frames"])
        yield f"slow of {r['raw_frames']}", slow.tolist(), r["slow"], 0
        yield f"fast of {r['raw_frames']}", fast.tolist(), r["fast"], 0


@case("slowfast", "resize")
def resized(c, path):
    z = np.load(path.parent / c["arrays"])
    note = json.loads((path.parent / "sampling.json").read_text())["resize_npz"]
    seed, t, h, w, short, long = map(int, re.search(
        r"seed (\d+), T (\d+), (\d+)x(\d+)\) resized with min (\d+), max (\d+)", note).groups())
    rule = ClipRule(short=short, long=long)
    got = np.stack([resize(im, fit_size(h, w, rule)) for im in frames(seed, t, h, w)])
    tol = c["tolerance"]["grey_levels"]
    yield "shape", np.array(got.shape), z["out_shape"], 0
    n = len(z["out"])
    yield "pixels", got[:n], z["out"], tol
    yield "normalised", normalise(got[:1], rule)[:, 0], z["normalized_first_frame"], tol / min(rule.std) * 1.001


@case("slowfast", "color_jitter")
def color_jitter(c, path):
    z = np.load(path.parent / c["arrays"])
    tol = c["tolerance"]["grey_levels"]
    yield "bounds", np.array(HSV_REACH), z["bounds"], 0
    for by, want in zip(z["shifts"], z["out"], strict=True):
        yield f"shift by {by.tolist()}", shift_hsv(z["image"], tuple(map(int, by))), want, tol


@case("slowfast", "csv_to_coco")
def coco_json(c, path):
    tol, want = c["tolerance"]["pixels"], c["expected"]
    with tempfile.TemporaryDirectory() as d:
        csv = Path(d) / "gt.csv"
        csv.write_text("\n".join(c["csv"]) + "\n")
        got = ad.csv_to_coco(csv, c["movie_list"], c["keyframe_sizes_wh"], tuple(want.get("timestamps", (902, 1798))))
    for k in ("categories", "annotations"):
        yield k, got[k], want[k], tol
    images = got["images"]
    yield "images", [len(images), images[0], images[-1]], [want[k] for k in ("num_images", "first_image", "last_image")], 0
    if "timestamps" in want:
        seconds = [i["timestamp"] for i in images]
        yield "timestamps", [min(seconds), max(seconds)], want["timestamps"], 0


@case("slowfast", "predictions_to_csv")
def csv_rows(c, path):
    for thr, want in c["rows_by_action_thresh"].items():
        got = []
        for v, p in zip(c["video_info"], c["predictions"], strict=True):
            got += ad.result_lines(v["movie"], v["timestamp"], (v["width"], v["height"]), p["boxes"],
                                   p["size_wh"], p["scores"], least=float(thr))
        yield f"rows from {thr}", got, want, 0


class Counted:
    "A second whose frames bear their number, as the README's data set decodes."
    def __init__(self, size, n, base):
        self.size, self.n, self.base = size, n, base

    def __len__(self):
        return self.n

    def fetch(self, at, size=None):
        w, h = self.size
        ims = [np.full((h, w, 3), self.base + k, np.uint8) for k in at]
        return [resize(im, size(h, w)) for im in ims]


@case("slowfast", "dataset")
def dataset(c, path):
    tol, cfg = c["tolerance"]["pixels"], c["config"]
    rule = ClipRule(frames=cfg["frame_num"], rate=cfg["sample_rate"], tau=cfg["tau"], alpha=cfg["alpha"],
                    short=cfg["min_size"], long=cfg["max_size"], mean=(0, 0, 0), std=(1, 1, 1))
    sizes = {i["movie"]: (i["width"], i["height"]) for i in c["annotations"]["images"]}
    per, odd, short, first = map(int, re.search(
        r"to (\d+) frames \((\d+) for t=(\d+)\) of constant value \(t-(\d+)\)", c["decode"]).groups())

    def source(movie):
        def open_part(t):
            return Counted(sizes[movie], odd if t == short else per, (t - first) * per)
        return Seconds(movie, open=open_part, parts={t: t for t in range(first - 60, 3000)})

    data = ad.read_annotations(c["annotations"])
    ad.add_boxes(data, c["person_boxes"], cfg["box_thresh"])
    ad.add_objects(data, c["object_boxes"], cfg["max_object"])
    draws = cfg["slow_jitter"], cfg["color_jitter"]
    for name, want in c["expected"].items():
        flip = name.endswith("flipped")
        clips = ad.ActionClips(data, source, rule, list(range(1, 81)), name.startswith("train"), 0, *draws)
        yield f"{name}: clips", len(clips), len(want), 0
        for k, w in enumerate(want):
            it, f = clips.item(k, Draw(flip=flip)), clips.frames[k]
            wide = it["size"][1]
            numbers = lambda v: v[0, :, 0, 0].round().astype(int).tolist()
            got = dict(index=k, movie=f.movie, timestamp=f.second, video_wh=[round(v) for v in f.size],
                       slow_shape=list(it["slow"].shape), fast_shape=list(it["fast"].shape),
                       slow_frames=numbers(it["slow"]), fast_frames=numbers(it["fast"]),
                       box_size_wh=[wide, it["size"][0]], boxes=it["boxes"].tolist(),
                       action_ids=[list(f.actions[j]) for j in it["which"]] if clips.train else None,
                       objects=it["objects"].tolist(),
                       object_scores=f.object_scores.tolist() if len(f.object_scores) else None)
            if flip:  # the published code leaves objects where they were: ours are mirrored
                w = dict(w, objects=[[wide - b[2] - 1, b[1], wide - b[0] - 1, b[3]] for b in w["objects"]])
            exact = {"boxes", "objects", "object_scores"}
            for key in w:
                yield f"{name} {k} {key}", got[key], w[key], tol if key in exact else 0


@case("slowfast", "loader_matching")
def loader_matching(c, path):
    for one in c["cases"]:
        yield one["title"], published_matching(one["model_keys"], one["file_keys"], one["no_head"]), one["loaded"], 0
