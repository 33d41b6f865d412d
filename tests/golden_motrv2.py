"""Golden checks of MOTRv2: the network, tracking, training, its data."""
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from crowdlens.core.boxes import to_rel, xywh_to_cxcywh, xywh_to_xyxy
from crowdlens.core.det_db import frame_key, read_det_db, split_key
from crowdlens.core.files import read_json, write_json
from crowdlens.models import motrv2, motrv2_clips as clips, motrv2_loss as loss
from crowdlens.models import motrv2_queries as queries, motrv2_transformer as parts
from fillweights import fill
from goldenkit import case


def network(c, path):
    "The case's network: weights filled by name and shape."
    state = {}
    for name, (shape, dtype) in read_json(path.parent / c["manifest"]).items():
        source = name
        for old, new in c.get("tied", {}).items():
            if name.startswith(old):
                source = new + name[len(old):]
        x = fill(source, shape, dtype)
        for pattern, factor in c.get("overrides", {}).items():
            if re.search(pattern, source):
                x = x * np.float32(factor)
        if source in c.get("constants", {}):
            x = np.asarray(c["constants"][source], dtype).reshape(shape)
        state[name] = x
    return motrv2.load(state)


def arrays(c, path):
    with np.load(path.parent / c.get("arrays", path.with_suffix(".npz").name)) as z:
        return {k: z[k] for k in z.files}


def sorted_rows(x):
    x = np.asarray(x, np.float64).reshape(-1, 5)
    return x[np.lexsort(x.round(6).T)]


NAMES = dict(pred_logits="pred_logits", aux_logits="pred_logits", pred_boxes="pred_boxes", aux_boxes="pred_boxes", hs="hs",
             scores="scores", boxes="boxes_px", query_pos="query_pos", ref_pts="pred_boxes", ids="ids", disappear_time="ids")


@case("motrv2", "infer")
def infer(c, path):
    z, tol, n = arrays(c, path), c["tolerance"], c["frames"]
    frames = [z[f"frame_{t}"] for t in range(n)]
    yield "frame size", [list(f.shape[:2]) for f in frames], [list(c["frame_size"])] * n, 0
    h, w = c["frame_size"]
    db = read_det_db(path.parent / c["det_db"])
    keys = [frame_key(c["sequence"], t + 1) for t in range(n)]
    yield "det_db frames", sorted(db), sorted(keys), 0
    for t, k in enumerate(keys):
        rows = np.c_[to_rel(xywh_to_cxcywh(db[k][:, :4]), (w, h)), db[k][:, 4]]
        yield f"proposals {t}", sorted_rows(rows), sorted_rows(z[f"proposals_{t}"]), 1e-6
    rule = c["size_rule"]
    size = motrv2.network_size(h, w, rule["short_side"], rule["long_side_max"])
    yield "network size", list(size), list(c["network_size"]), 0
    tracks = network(c, path).track(
        frames, [z[f"proposals_{t}"] for t in range(n)], score=c["score_threshold"], update=c["update_score_threshold"],
        miss_tolerance=c["miss_tolerance"], min_area=c["area_threshold"], size_rule=rule, raw=True)
    lines, before, living = [], set(), dict(queries=[], live=[], born=[], died=[])
    for t, got in enumerate(tracks):
        for k in NAMES:
            exact = tol[NAMES[k]] if NAMES[k] != "ids" else 0
            yield f"{k} {t}", got.raw[k], z[f"{k}_{t}"], exact
        if f"resized_{t}" in z:
            yield f"resized {t}", motrv2.to_size(frames[t], size), z[f"resized_{t}"], 0
        lines += motrv2.result_lines(got, t + 1)
        ids = set(got.ids.tolist())
        for k, v in zip(living, (len(got.raw["pred_logits"]), len(ids), len(ids - before), len(before - ids))):
            living[k].append(v)
        before = ids
    yield "counts", living, {k: c["summary"][k] for k in living}, 0
    yield from result_text(lines, (path.parent / c["text"]).read_text().splitlines(), tol["text_px"])


def result_text(got, want, tol):
    "Line by line: all but the box as text, the box in pixels."
    cut = [[v.split(",") for v in x] for x in (got, want)]
    rest = [[v[:2] + v[6:] for v in x] for x in cut]
    yield "text, ids and order", rest[0], rest[1], 0
    boxes = [np.array([[float(y) for y in v[2:6]] for v in x]).reshape(-1, 4) for x in cut]
    yield "text, boxes", boxes[0], boxes[1], tol


@case("motrv2", "train")
def train(c, path):
    z, tol, n = arrays(c, path), c["tolerance"], c["frames"]
    every = lambda k: [z[f"{k}_{t}"] for t in range(n)]
    yield "network size", [list(f.shape[:2]) for f in every("frame")], [list(c["network_size"])] * n, 0
    model = network(c, path).train()
    for k, p in model.named_parameters():
        p.requires_grad_(not re.match(r"backbone\.0\.body\.(conv1|bn1|layer1)\b", k))
    gt, noise = every("gt_boxes"), c["query_denoise"]
    draws = None
    if noise:
        draws = [torch.as_tensor(v) for v in every("dn_rand")]
        torch.manual_seed(c["noise_seed"])
        for t in range(n):
            yield f"dn_rand {t}", torch.rand(len(gt[t]), 4), z[f"dn_rand_{t}"], 1e-6
            yield f"dn_boxes {t}", loss.jitter(torch.as_tensor(gt[t]), draws[t], noise), z[f"dn_boxes_{t}"], tol["pred_boxes"]
    got = loss.clip_loss(model, loss.Clip(every("frame"), every("proposals"), gt, every("gt_ids")), noise, draws, keep=True)
    close = dict(pred_logits=tol["pred_logits"], pred_boxes=tol["pred_boxes"], iou=tol["iou"], in_ids=0, ids=0, matched_gt=0,
                 out_ids=0, out_ref_pts=tol["pred_boxes"], out_query_pos=tol.get("query_pos", tol["pred_logits"]))
    for t, frame in enumerate(got.frames):
        for k, v in frame.items():
            yield f"{k} {t}", v, z[f"{k}_{t}"], close[k]
    yield "frames that go on", [t for t, f in enumerate(got.frames) if "out_ids" in f], list(range(n - 1)), 0
    yield "loss names", list(got.values), [str(v) for v in z["loss_names"]], 0
    rel = tol["loss_relative"]
    yield "losses", torch.stack(list(got.values.values())), z["loss_values"], 1e-7, rel
    yield "weights", np.array(list(got.weights.values())), z["loss_weights"], 0
    yield "total", got.total.item(), float(z["total"]), 0, rel
    yield "total, in the case", got.total.item(), c["total"], 0, rel
    yield "samples", [int(got.samples)] * 2, [int(z["num_samples"]), c["num_samples"]], 0
    kept = [(int((f["out_ids"] >= 0).sum()), int((f["out_ids"] < 0).sum())) for f in got.frames[:-1]]
    away = [int(((f["ids"] >= 0) & (f["matched_gt"] < 0)).sum()) for f in got.frames]
    counts = dict(kept_with_id=[a for a, _ in kept], kept_without_id=[b for _, b in kept], tracks_without_gt=away,
                  proposals=[len(v) for v in every("proposals")], gt=[len(v) for v in gt])
    yield "counts", counts, {k: c["summary"][k] for k in counts}, 0
    yield from gradients(model, got.total, z, tol)


def gradients(model, total, z, tol):
    total.backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    for k, want in z.items():
        if k.startswith("grad/"):
            yield k, grads[k[5:]], want, tol["grad_relative_to_max"] * np.abs(want).max()
    names = [str(v) for v in z["gradnorm_names"]]
    yield "names with a gradient", sorted(k for k, g in grads.items() if g is not None), sorted(names), 0
    for k, want in zip(names, z["gradnorm_values"]):
        yield f"gradnorm {k}", grads[k].norm().item(), float(want), 1e-12, tol["gradnorm_relative"]


@case("motrv2", "units")
def units(c, path):
    z, tol = arrays(c, path), c["tolerance"]["absolute"]
    t = {k: torch.as_tensor(v) for k, v in z.items()}
    yield "score embedding", queries.embed_numbers(t["score"][:, 0], t["score_embedding"].shape[1]), z["score_embedding"], tol
    yield "box embedding", queries.embed_boxes(t["box"], t["box_embedding"].shape[1]), z["box_embedding"], tol
    for k in [k for k in z if re.fullmatch(r"sine_\d+x\d+", k)]:
        C, h, w = z[k].shape
        yield k, queries.embed_grid(h, w, C).T.reshape(C, h, w), z[k], tol
    yield "inverse sigmoid", parts.inverse_sigmoid(t["inverse_sigmoid_in"]), z["inverse_sigmoid_out"], tol
    a, b = t["giou_boxes"].split([len(z["giou"]), len(z["giou_boxes"]) - len(z["giou"])])
    pairs = [[loss.overlap(x[None], y[None])[1].item() for y in b] for x in a]
    yield "giou", np.array(pairs), z["giou"], tol
    yield "focal", loss.focal(t["focal_logits"], t["focal_targets"]).sum().item(), float(z["focal_loss_sum"]), tol
    yield from attention(t, z, tol)


def attention(t, z, tol):
    "One deformable attention; heads and points follow from the sizes."
    src, shapes = t["attn/src"], [tuple(s) for s in z["attn/spatial_shapes"].tolist()]
    levels, width = len(shapes), src.shape[-1]
    per_level = len(z["attn/attention_weights.bias"]) // levels
    heads = 4 if per_level % 4 == 0 else next(h for h in (8, 6, 2, 1) if per_level % h == 0)
    att = parts.DeformableAttention(width, levels, heads, per_level // heads)
    att.load_state_dict({k[5:]: v for k, v in t.items() if re.fullmatch(r"attn/\w+\.(weight|bias)", k)})
    with torch.no_grad():
        for k in ("points", "boxes"):
            yield f"attention at {k}", att(t["attn/query"], t[f"attn/ref_{k}"], src, shapes), z[f"attn/out_{k}"], tol


@case("motrv2", "data")
def data(c, path):
    tol = c["tolerance"]["pixels"]
    h, w = c["frame_size"]
    with tempfile.TemporaryDirectory() as tmp:
        gt, db = Path(tmp) / "gt.txt", Path(tmp) / "db.json"
        gt.write_text("\n".join(c["gt_txt"]))
        write_json(db, c["det_db"])
        truth, found = clips.read_gt(gt), read_det_db(db)
    found = {split_key(k)[1]: v for k, v in found.items()}
    seq = clips.Sequence([np.zeros((h, w, 3), np.uint8)] * max(found), found, truth)
    last, n = max(truth), c["sampler_lengths"]
    starts = seq.starts(n)
    yield "starts", starts, c["clip_starts"], 0
    yield "number of starts", len(starts), c["length"], 0
    yield "last frame", last, c["last_frame"], 0
    yield "frames", sorted(map(str, range(min(truth), last + 1))), sorted(c["frames"]), 0
    for k, want in c["frames"].items():
        v = seq.view(int(k))
        yield from boxes_of(f"frame {k}", v, want, tol)
        yield f"frame {k}, labels", [0] * len(v.ids), want["labels"], 0
        if want["ids"]:  # without any the published loader's type breaks it
            yield f"frame {k}, type", f"torch.{v.ids.dtype}", want["label_dtype"], 0
    for s in c["sampled"]:
        random.seed(s["python_random_seed"])
        step = random.randint(1, c["sample_interval"] + 1)
        yield f"clip of seed {s['python_random_seed']}", clips.clip_frames(s["start"], n, step, last), s["frames"], 0
    yield from geometry(c, seq, tol)
    for s in c["train_resize"]:
        yield f"training size {s['wh']} {s['size']}", list(clips.train_size(*s["wh"], s["size"], s["max_size"])), s["result_wh"], 0
    for s in c["inference_resize"]:
        size = motrv2.network_size(*s["wh"][::-1])
        yield f"size {s['wh']}", list(size[::-1]), s["result_wh"], 0


def boxes_of(what, v, want, tol):
    four = lambda b: np.asarray(b, np.float64).reshape(-1, 4)
    yield f"{what}, gt", v.boxes_xyxy, four(want["gt_boxes_xyxy"]), tol
    yield f"{what}, ids", v.ids, np.asarray(want["ids"], np.float64), 0
    yield f"{what}, proposals", v.proposals_xyxy, four(want["proposals_xyxy"]), tol
    yield f"{what}, scores", v.scores, np.asarray(want["proposal_scores"], np.float64), 1e-6


def geometry(c, seq, tol):
    "Each transform of the frame that shows what `none` shows."
    none = next(t for t in c["transforms"] if t["name"] == "none")
    same = lambda k: len(c["frames"][k]["ids"]) == len(none["ids"]) and np.allclose(
        np.ravel(c["frames"][k]["gt_boxes_xyxy"]), np.ravel(none["gt_boxes_xyxy"]), atol=.01)
    base = seq.view(int(next(k for k in c["frames"] if same(k))))
    for t in c["transforms"]:
        if t["name"] == "none":
            v = base
        elif t["name"] == "hflip":
            v = clips.mirror(base)
        elif "region_top_left_h_w" in t:
            v = clips.crop(base, t["region_top_left_h_w"])
        else:
            v = clips.resize(base, t["size"], t["max_size"])
        yield f"{t['name']}, size", list(v.size), t["size_wh"], 0
        yield from boxes_of(t["name"], v, t, tol)
