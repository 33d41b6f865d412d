"""Golden checks of D-FINE: published weights through transformers, the
criterion, whole training steps, and the training recipe."""
import json
import re

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from crowdlens.core.letterbox import Place, from_network
from crowdlens.models import dfine
from crowdlens.models import dfine_criterion as dc
from crowdlens.models import dfine_training as dt
from crowdlens.models.detector import to_scores
from fillweights import filled
from goldenkit import case


def weights(c, path):
    "The published state dict of a case, and its arrays."
    manifest = json.loads((path.parent / c["manifest"]).read_text())
    w = filled({k: v for k, v in manifest.items() if k not in c.get("derived", ())})
    for prefix, factor in c.get("overrides", {}).items():
        for k in w:
            if k.startswith(prefix) and w[k].dtype == np.float32:
                w[k] = w[k] * np.float32(factor)
    for k, v in c.get("shift", {}).items():
        w[k] = w[k] + np.float32(v)
    for k, v in c.get("constants", {}).items():
        w[k] = np.asarray(v, w[k].dtype).reshape(w[k].shape)
    with np.load(path.parent / c.get("arrays", path.stem + ".npz")) as z:
        return w, dict(z)


def by_token(want, got, scores, tol):
    "For each recorded query the place of ours that began at the same token; -1 where a tie at the cut let it go."
    at = {t: i for i, t in enumerate(got.tolist())}
    assert len(at) == len(got), "a token was taken twice"
    cut = scores[got].min()
    out = np.array([at.get(t, -1) for t in want.tolist()])
    gone = want[out < 0]
    assert len(set(want.tolist())) == len(want) and (gone < len(scores)).all() and (gone >= 0).all(), "not these tokens"
    assert all(abs(scores[t] - cut) <= tol for t in gone), f"tokens {gone[:3]} were not chosen"
    return out


@case("dfine", "forward")
def forward(c, path):
    w, z = weights(c, path)
    tol = c["tolerance"]
    model = dfine.load_dfine(w, c["size"])
    seen = []
    model.model.enc_score_head.register_forward_hook(lambda m, a, out: seen.append(out.max(-1).values))
    with torch.inference_mode():
        out = model(pixel_values=torch.from_numpy(z["pixels"]).float() / 255)
    scores = seen[0].numpy()
    tokens = seen[0].topk(out.logits.shape[1], dim=1).indices.numpy()
    logits, boxes = out.logits.numpy(), out.pred_boxes.numpy()
    yield "shape of logits", list(logits.shape), list(z["logits"].shape), 0
    order = [by_token(*v, tol["logits"]) for v in zip(z["query_token"], tokens, scores)]
    yield "queries found", min(float((o >= 0).mean()) for o in order), 1, .02
    for b, o in enumerate(order):
        k = o >= 0
        yield f"logits of image {b}", logits[b, o[k]], z["logits"][b, k], tol["logits"]
        yield f"boxes of image {b}", boxes[b, o[k]], z["boxes"][b, k], tol["boxes"]
    yield from top(c, z, out, tol)
    yield from stats(c, logits, boxes)


def top(c, z, out, tol):
    "The best of queries x classes, as a set; a few more of ours are at hand for ties at the cut."
    n = z["top_scores"].shape[1]
    s, l, q = to_scores(out.logits, c["num_classes"], n + 20)
    net = tuple(c["input_size"])
    for b, (w, h) in enumerate(z["orig_sizes"].tolist()):
        place = Place((h, w), net, net)
        box = from_network(place, out.pred_boxes[b, q[b]].numpy(), clip=False)
        want = [z[k][b] for k in ("top_scores", "top_labels", "top_boxes")]
        yield f"top scores of image {b}", s[b, :n].numpy(), np.sort(want[0])[::-1], tol["scores"]
        off = np.abs(s[b].numpy() - want[0][:, None]) / tol["scores"]
        off = np.maximum(off, np.abs(box - want[2][:, None]).max(-1) / tol["top_boxes_px"])
        off[l[b].numpy() != want[1][:, None]] = np.inf
        r, k = linear_sum_assignment(np.minimum(off, 1e6))
        yield f"top detections of image {b}", off[r, k], np.zeros(n), 1


def stats(c, logits, boxes):
    "Figures over all logits and boxes that the case records beside them."
    want = c.get("stats", {})
    got = dict(logits_mean=logits.mean(), logits_std=logits.std(ddof=1), boxes_mean=boxes.mean((0, 1)),
               boxes_std=boxes.reshape(-1, 4).std(0, ddof=1), min_wh=boxes[..., 2:].min())
    for k in got.keys() & want.keys():
        yield k, np.asarray(got[k]).tolist(), want[k], c["tolerance"]["logits" if "logits" in k else "boxes"]


def targets(z, n):
    return [dict(class_labels=torch.from_numpy(z[f"target{i}_labels"]),
                 boxes=torch.from_numpy(z[f"target{i}_boxes"])) for i in range(n)]


def raw(z, c):
    "Recorded outputs under transformers' names, denoising queries first."
    t = {k: torch.from_numpy(v) for k, v in z.items()}
    layers = c["num_layers"]

    def both(f):
        return torch.cat([f("dn"), f("main")], 2) if "dn" in c else f("main")
    plain = lambda p: t[p + "_ref"][None]
    per = lambda x: x.transpose(0, 1)
    out = dict(
        intermediate_logits=both(lambda p: per(torch.cat([t[p + "_pre_logits"][None], t[p + "_logits"]]))),
        intermediate_reference_points=both(lambda p: per(torch.cat([plain(p), t[p + "_boxes"]]))),
        intermediate_predicted_corners=both(lambda p: per(t[p + "_corners"])),
        initial_reference_points=both(lambda p: per(plain(p).expand(layers, *t[p + "_ref"].shape))),
        enc_topk_logits=t["enc_logits"], enc_topk_bboxes=t["enc_boxes"])
    if "dn" in c:
        d = c["dn"]
        out["denoising_meta_values"] = dict(dn_positive_idx=[torch.tensor(v, dtype=torch.long) for v in d["positive_idx"]],
                                            dn_num_group=d["groups"], dn_num_split=d["num_split"])
    return out


def settings(c):
    "A configuration with the constants of a case."
    m = c["matcher"]
    given = dict(max_num_bins=c["reg_max"], focal_loss_alpha=c["vfl"]["alpha"], focal_loss_gamma=c["vfl"]["gamma"],
                 reg_scale=c["reg_scale"], up=c["up"], matcher_alpha=m["alpha"], matcher_gamma=m["gamma"],
                 matcher_class_cost=m["cost_class"], matcher_bbox_cost=m["cost_bbox"],
                 matcher_giou_cost=m["cost_giou"], **{"weight_" + k: v for k, v in c["weights"].items()})
    kinds = {k: int if k == "max_num_bins" else float for k in given}
    return dfine.DFineConfig(num_labels=c["num_classes"], **{k: kinds[k](v) for k, v in given.items()})


@case("dfine", "criterion")
def criterion(c, path):
    with np.load(path.parent / c.get("arrays", path.stem + ".npz")) as f:
        z = dict(f)
    tol = c["tolerance"]
    out, tgt, crit = raw(z, c), targets(z, c["batch"]), dc.DFineCriterion(settings(c))
    got = {k: v.item() for k, v in crit(out, tgt).items()}
    yield "terms", got, c["losses"], tol["absolute"], tol["relative"]
    for k, want in (("total", c["total"]), ("total_without_dn", c.get("total_without_dn"))):
        if want is not None:
            sums = sum(v for n, v in got.items() if k == "total" or "_dn" not in n)
            yield k, sums, want, tol["absolute"], tol["relative"]
    main, _, enc = dc.split_outputs(out)
    pairs, (b, q, o) = crit._match(main, enc, tgt)
    yield "pairs of the last layer", [[v.tolist() for v in p] for p in pairs[0]], c["matched_last_layer"], 0
    union = [[[i, j] for i, j in zip(q[b == k].tolist(), o[b == k].tolist())] for k in range(c["batch"])]
    yield "united pairs", union, c["go_union"], 0
    yield "groups and sizes", [out["intermediate_logits"].shape[2], c["num_layers"]], [
        sum(c["dn"]["num_split"]) if "dn" in c else c["num_queries"], z["main_logits"].shape[0]], 0


@case("dfine", "loss")
def loss(c, path):
    w, z = weights(c, path)
    tol = c["tolerance"]
    tgt = targets(z, len(z["pixels"]))
    names = dfine.to_transformers({k: torch.as_tensor(v) for k, v in w.items()})
    for key, want in c.items():
        m = re.fullmatch(r"denoising_(\d+)_torch_seed_(\d+)", key)
        if not m and key != "without_denoising":
            continue
        model = dfine.load_dfine(w, c["size"], num_denoising=int(m[1]) if m else 100)
        dfine.freeze_stem(model)
        model.config.num_denoising = int(m[1]) if m else 0
        step = dc.LossModel(model.train())
        seen = []
        model.model.register_forward_hook(lambda mod, a, out: seen.append(out))
        torch.manual_seed(int(m[2]) if m else 0)
        terms = step(torch.from_numpy(z["pixels"]).float() / 255, tgt)
        got = {k: v.item() for k, v in terms.items()}
        yield f"{key}: terms", got, want["losses"], tol["losses_absolute"], tol["losses_relative"]
        yield f"{key}: total", sum(got.values()), want["total"], tol["losses_absolute"], tol["losses_relative"]
        main, _, enc = dc.split_outputs(seen[0])
        _, (b, _, _) = step.criterion._match(main, enc, tgt)
        yield f"{key}: united pairs", np.bincount(b, minlength=len(tgt)).tolist(), want["go_pairs"], 0
        if not m:
            best = enc.logits.amax(-1).detach().numpy()
            logits, boxes = (v[-1].detach().numpy() for v in (main.logits, main.boxes))
            for b, scores in enumerate(best):
                o = untie(logits[b], z["train_logits"][b], scores, tol["train_logits"])
                yield f"train logits of image {b}", logits[b, o], z["train_logits"][b], tol["train_logits"]
                yield f"train boxes of image {b}", boxes[b, o], z["train_boxes"][b], tol["train_boxes"]
        sum(terms.values()).backward()
        yield f"{key}: gradient norms", norms(model, want["grad_norm"]), want["grad_norm"], 0, tol["grad_relative"]
        assert not set(want) - {"losses", "total", "go_pairs", "tie_sensitivity", "grad_norm"}
    yield "every weight was used", sorted(set(names) - set(model.state_dict())), [], 0


def untie(got, want, scores, tol):
    "The order of ours in which queries whose encoder scores tie stand as recorded."
    order = np.arange(len(got))
    if got.shape != want.shape:
        return order
    bad = np.flatnonzero(np.abs(got - want).max(-1) > tol)
    _, to = linear_sum_assignment(np.abs(want[bad][:, None] - got[bad][None]).max(-1)) if len(bad) else (0, [])
    for i, j in zip(bad, bad[to]):
        if abs(scores[i] - scores[j]) <= tol:
            order[i] = j
    return order


def norms(model, names):
    "L2 norms of the gradients under published prefixes."
    g = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    g = dfine.to_published({k: g.get(k, torch.zeros_like(v)) for k, v in model.state_dict().items()
                            if v.is_floating_point()})
    def norm(prefix):
        rows = [v.double().pow(2).sum() for k, v in g.items() if (prefix == "all" or k.startswith(prefix))
                and not k.startswith("decoder.decoder.up") and not k.startswith("decoder.decoder.reg")]
        return torch.stack(rows).sum().sqrt().item()
    return {k: norm(k) for k in names}


@case("dfine", "recipe")
def recipe(c, path):
    rel = c["tolerance"]["relative"]
    for size, want in c["sizes"].items():
        want = dict(want)
        r = dt.recipe(size)
        model = dfine.DFineForObjectDetection(dt.config_of(size))
        frozen = dfine.freeze_stem(model)
        groups = dt.published_groups(model, r["lr"], r["backbone_lr"], r["weight_decay"])
        back = published_names(model)
        yield f"{size}: frozen", sorted(back[n] for n in frozen), sorted(want.pop("frozen")), 0
        total = sum(p.numel() for p in model.parameters())
        yield f"{size}: parameters", total, want.pop("parameters_total"), 0
        got = want.pop("groups")
        yield f"{size}: number of groups", len(groups), len(got), 0
        where = {id(p): n for n, p in model.named_parameters()}
        for k, (g, w) in enumerate(zip(groups, got)):
            w = dict(w)
            names = {back[where[id(p)]] for p in g["params"]}
            yield f"{size}: examples of group {k}", sorted(set(w.pop("examples")) - names), [], 0
            mine = dict(lr=g["lr"], weight_decay=g["weight_decay"], tensors=len(names),
                        parameters=sum(p.numel() for p in g["params"]))
            yield f"{size}: group {k}", mine, w, 0, rel
        yield f"{size}: schedule", {k: r.get(k) for k in want}, want, 0, rel
    for k, want in c["multi_scale"].items():
        base, rep = map(int, k.split("x"))
        yield f"sizes {k}", dt.multi_scale(base, rep), want, 0
    yield "averaging", {k: dt.ema_decay(int(k)) for k in c["ema_decay_at_update"]}, c["ema_decay_at_update"], 0, rel
    yield "warm-up", {k: dt.warmup_factor(int(k)) for k in c["warmup_factor_at_step"]}, c["warmup_factor_at_step"], 0, rel


def published_names(model):
    "transformers' name of a parameter -> the published; q, k and v have one."
    out = {}
    for n, _ in model.named_parameters():
        p = dfine._rename(n, dfine._FROM, -1)
        out[n] = re.sub(r"\.[qkv]_proj\.(weight|bias)$", r".in_proj_\1", p)
    return out
