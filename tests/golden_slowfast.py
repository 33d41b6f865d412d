"""Golden checks of SlowFast: network, loss, schedule, training, loading."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from crowdlens.models import action_loss as losses
from crowdlens.models import action_training as training
from crowdlens.models import slowfast as sf
from crowdlens.models.memory_pool import MemoryPool
from goldenkit import case

MEAN, STD = np.float32([122.7717, 115.9465, 102.9801]), np.float32(57.375)
INTERACTION = dict(baseline=None, denseserial="dense", serial="serial", parallel="parallel")


def filled(path, manifest, overrides=None):
    "The weights of a case, by the recipe beside the cases."
    root = next(p for p in path.parents if (p / "fill.py").exists())
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    import fill
    return fill.case_weights(dict(overrides=overrides or {}), path.parent / manifest)


def kind_of(config):
    "(arch, interaction) of a published configuration's name."
    stem = Path(config).stem
    arch = "r101_8x8" if "101" in stem else "r50_4x16"
    return arch, INTERACTION[stem.rpartition("_")[2]]


def built(c, path, manifest="manifest"):
    "The detector of a case, with its weights."
    arch, ia = kind_of(c["config"])
    w = filled(path, c[manifest], c["overrides"])
    return sf.load(w, arch, ia or "", w["roi_heads.action.predictor.cls_score.bias"].shape[0])


def frames(seed, T, H, W):
    "The test pictures of a seed, (T, H, W, 3) uint8."
    rng = np.random.default_rng(seed)
    c = rng.integers(0, 256, (T // 8, -(-H // 16), -(-W // 16), 3))
    c = c.repeat(8, 0).repeat(16, 1).repeat(16, 2)[:T, :H, :W]
    return ((3 * c + rng.integers(0, 256, (T, H, W, 3))) // 4).astype(np.uint8)


def batch(clips, T, pathways):
    "Slow and fast clip of several clips, normalised and padded."
    sizes = [(c["height"], c["width"]) for c in clips]
    H, W = (-(-max(s[k] for s in sizes) // 16) * 16 for k in (0, 1))
    x = np.zeros((len(clips), 3, T, H, W), np.float32)
    for i, c in enumerate(clips):
        h, w = sizes[i]
        f = (frames(c["frame_seed"], T, h, w).astype(np.float32) - MEAN) / STD
        x[i, :, :, :h, :w] = f.transpose(3, 0, 1, 2)
    x = torch.from_numpy(x)
    tau, step = pathways.tau, pathways.tau // pathways.alpha
    return x[:, :, (tau - 1) // 2::tau], x[:, :, (step - 1) // 2::step], sizes


def filled_pool(spec):
    "The memory pool that a case starts from."
    pool = MemoryPool()
    if not spec:
        return pool
    counts = [e["count"] for e in spec["entries"]]
    rng = np.random.default_rng(spec["feature_seed"])
    rows = (1.2 * np.abs(rng.standard_normal((sum(counts), 2304)))).astype(np.float32)
    for e, x in zip(spec["entries"], np.split(rows, np.cumsum(counts)[:-1])):
        pool.put(e["movie"], e["timestamp"], x, e.get("loss_tag", 0.0))
    return pool


def arrays(c, path):
    return np.load(path.parent / c.get("arrays", path.stem + ".npz"))


@case("slowfast", "forward")
def forward(c, path):
    yield from network(c, path, built(c, path))


@case("slowfast", "load_pretrained")
def load_pretrained(c, path):
    model = built(c, path, "start_manifest")
    w = filled(path, c["file_manifest"])
    sf.fill_actions(model, sf.plain_names({"model": w}), no_head=c["flags"]["no_head"])
    yield from network(c, path, model)


def network(c, path, model):
    "Every whole array that a forward records."
    z, tol = arrays(c, path), c["tolerance"]["absolute"]
    slow, fast, sizes = batch(c["clips"], c["frames"], model.config.pathways)
    ia, pool = model.config.ia, filled_pool(c.get("pool"))
    memory = [pool.window(k["movie"], k["timestamp"], ia) for k in c["clips"]] if ia else None
    with torch.inference_mode():
        got = model(slow, fast, [k["boxes"] for k in c["clips"]], sizes=sizes,
                    objects=[k["objects"] for k in c["clips"]], memory=memory, raw=True)
    have = got.raw | dict(logits=got.logits, scores=got.scores, result_boxes=torch.cat(got.boxes))
    for k in z.files:
        if "/" not in k:
            want = z[k]
            yield k, have[k].reshape(want.shape) if have[k].numel() == want.size else have[k], want, tol


@case("slowfast", "two_stage")
def two_stage(c, path):
    model, z, tol = built(c, path), arrays(c, path), c["tolerance"]["absolute"]
    size = int(re.search(r"batches of (\d+)", c["batching"])[1])
    ia, pool, seen = model.config.ia, MemoryPool(), []
    with torch.inference_mode():
        for at in range(0, len(c["clips"]), size):
            clips = c["clips"][at:at + size]
            slow, fast, sizes = batch(clips, c["frames"], model.config.pathways)
            got = model(slow, fast, [k["boxes"] for k in clips], sizes=sizes, objects=[k["objects"] for k in clips])
            n = [len(k["objects"]) for k in clips]
            for k, x, o, b in zip(clips, got.features.split(got.counts), got.objects.split(n), got.boxes):
                pool.put(k["movie"], k["timestamp"], x)
                seen.append((k, x, o, b))
        logits = torch.cat([model.classify(x, [len(x)], o, [len(o)], [pool.window(k["movie"], k["timestamp"], ia)])
                            for k, x, o, _ in seen])
    yield "logits", logits, z["logits"], tol
    yield "scores", losses.scores(logits, model.config.groups), z["scores"], tol
    yield "result_boxes", torch.cat([b for *_, b in seen]), z["result_boxes"], tol
    yield "box_counts", [len(b) for *_, b in seen], c["box_counts"], 0


@case("slowfast", "roi_align")
def roi(c, path):
    z = arrays(c, path)
    x, scale = torch.from_numpy(z["x"]), float(z["spatial_scale"])
    size = z["y"].shape[-1]
    rois = torch.from_numpy(z["rois"])
    order = torch.argsort(rois[:, 0], stable=True)
    for t in range(x.shape[2]):
        boxes = [rois[rois[:, 0] == b, 1:] for b in range(len(x))]
        grid = sf.sample_boxes(x[:, :, t], boxes, 1 / scale, size)
        yield f"samples of frame {t}", grid, z["y"][order.numpy(), :, t], c["tolerance"]["absolute"]


@case("slowfast", "loss")
def loss(c, path):
    z, tol = arrays(c, path), c["tolerance"]
    names = {"pose": "pose_action", "object": "object_interaction", "person": "person_interaction"}
    groups = tuple(losses.Group(names.get(n, n), k, n == "pose", w)
                   for n, k, w in zip(c["group_names"], c["groups"], c["loss_weights"]))
    x = torch.from_numpy(z["logits"]).requires_grad_()
    y = torch.from_numpy(z["labels"])
    boxes = float(z["avg_box_num"]) if "avg_box_num" in z.files else None
    got = losses.action_loss(x, y, groups, boxes=boxes)
    got["total_loss"].backward()
    rel = tol["losses_relative"]
    for k in z.files:
        if k.startswith("loss_"):
            yield k, got[k].item(), float(z[k]), 1e-12, rel
        elif k.startswith("accuracy_"):
            yield k, losses.accuracies(x, y, groups)[k].item(), float(z[k]), 1e-12, rel
    yield "total", got["total_loss"].item(), float(z["total"]), 1e-12, rel
    yield "gradient", x.grad, z["grad"], tol["gradient_absolute"]
    yield "scores", losses.scores(x.detach(), groups), z["scores"], 1e-5
    if boxes is not None:
        yield "boxes", float(len(x)), boxes, 1e-5


@case("slowfast", "schedule")
def schedule(c, path):
    rel = c["tolerance"]["lr_relative"]
    configs = json.loads((path.parent / "configs.json").read_text())["configs"]
    for name, part in c.items():
        if isinstance(part, dict) and "groups" in part:
            cfg = configs[part["config"]]
            r = recipe(cfg)
            arch, ia = kind_of(part["config"])
            with torch.device("meta"):
                model = sf.ActionDetector(sf.ActionConfig(sf.ARCHS[arch], ia=sf.Interaction(ia) if ia else None))
            yield f"{name} rate", [r.lr * training.rate(n, r) for n in part["steps_done"]], \
                part["lr_first_group"], 0, rel
            got = {g["name"]: [g["lr"], g["weight_decay"]] for g in training.param_groups(model, r)}
            want = {n: [float(v) for v in re.findall(r"(?:lr|wd) (\S+)", k)]
                    for k, names in part["groups"].items() for n in names}
            yield f"{name} groups", got, want, 0, rel
            opt, _ = training.optimiser(model, r)
            have = {k: opt.defaults[k] for k in ("momentum", "nesterov", "dampening")}
            yield f"{name} optimiser", have, {k: part[k] for k in have}, 1e-12
        elif isinstance(part, dict) and "max_iter" in part:
            r = training.Recipe(schedule="cosine", max_iter=part["max_iter"])
            yield name, [r.lr * training.rate(n, r) for n in part["steps_done"]], part["lr"], 1e-18, rel


def recipe(cfg):
    "The recipe of a published configuration."
    get = {k.rpartition("SOLVER.")[2]: v for k, v in cfg.items() if k.startswith("SOLVER.")}
    names = dict(BASE_LR="lr", MAX_ITER="max_iter", STEPS="steps", WARMUP_ITERS="warmup",
                 WARMUP_FACTOR="warmup_factor", WEIGHT_DECAY="weight_decay", IA_LR_FACTOR="ia_lr",
                 VIDEOS_PER_BATCH="clips")
    return training.Recipe(**{names[k]: v for k, v in get.items() if k in names})


@case("slowfast", "train")
def train(c, path):
    tol, z = c["tolerance"], arrays(c, path)
    configs = json.loads((path.parent / "configs.json").read_text())["configs"]
    cfg = configs[Path(c["config"]).stem] | c["config_overrides"]
    model = built(c, path)
    model.config.dropout = model.roi_heads.action.feature_extractor.dropout = \
        cfg["MODEL.ROI_ACTION_HEAD.DROPOUT_RATE"]
    if model.config.ia:
        model.config.ia.dropout = cfg["MODEL.IA_STRUCTURE.DROPOUT"]
    t = training.Trainer(model, recipe(cfg), shake=not c["no_box_jitter"])
    if t.pool is not None:
        t.pool = filled_pool(c["initial_pool"])
        t.loss = c["initial_cur_loss"]
    names = dict(model.named_parameters())
    rates = {g["name"]: [] for g in t.opt.param_groups}
    kept, grads = {}, {}
    take = t.opt.step

    def spy(*a, **k):
        for g in t.opt.param_groups:
            rates[g["name"]].append(g["lr"])
        grads.update({n: p.grad.clone() for n, p in names.items()})
        return take(*a, **k)
    t.opt.step = spy
    norms = {n: [] for n in names}
    for i, clips in enumerate(c["iterations"]):
        slow, fast, sizes = batch(clips, c["frames"], model.config.pathways)
        y = torch.zeros(sum(len(k["boxes"]) for k in clips), model.config.classes)
        for row, ids in zip(y, [ids for k in clips for ids in k["labels"]]):
            row[torch.tensor(ids, dtype=torch.long) - 1] = 1
        out = {}
        hook = model.register_forward_hook(lambda m, a, o: out.update(logits=o.logits.detach()))
        got = t.step([dict(slow=slow, fast=fast, sizes=sizes, labels=y, boxes=[k["boxes"] for k in clips],
                           objects=[k["objects"] for k in clips], keys=[(k["movie"], k["timestamp"]) for k in clips])])
        hook.remove()
        yield f"losses {i}", {k: got[k] for k in c["losses"][i]}, c["losses"][i], 0, tol["losses_relative"]
        yield f"metrics {i}", {k: got[k] for k in c["metrics"][i]}, c["metrics"][i], 1e-6
        yield f"logits {i}", out["logits"], z[f"logits/{i}"], tol["logits_absolute"]
        for n in names:
            norms[n].append(grads[n].double().norm().item())
        kept[i + 1] = {n: grads[n] for n in names if f"grad_{i + 1}/{n}/val" in z.files}
    yield from recorded(c, z, tol, norms, kept, names, rates)
    if t.pool is not None:
        yield from pool_after(c, t.pool, tol)


def recorded(c, z, tol, norms, kept, names, rates):
    "Gradients, rates and parameters of a training."
    want = c["grad_norms_iterations_1_and_2"]
    yield "gradient norms, names", sorted(norms), sorted(want), 0
    for j in (0, 1):
        rel = tol["gradnorm_relative"][str(j + 1)]
        big = {n: w[j] for n, w in want.items() if w[j] > tol["gradnorm_above"]}
        yield f"gradient norms {j + 1}", {n: norms[n][j] for n in big}, big, 0, rel
        small = {n: w[j] for n, w in want.items() if n not in big}
        yield f"small gradient norms {j + 1}", {n: norms[n][j] for n in small}, small, tol["gradnorm_above"]
    for k in z.files:
        part, _, leaf = k.rpartition("/")
        head, _, name = part.partition("/")
        if leaf != "val" or head == "logits":
            continue
        x = names[name].detach() if head == "param_after" else kept[int(head[5:])][name]
        t = tol["param_after_absolute" if head == "param_after" else "grad_absolute"]
        yield part, x.flatten()[torch.from_numpy(z[part + "/idx"])], z[k], t
        x = x.double()
        stats = [x.mean(), x.std(correction=0), x.min(), x.max()]
        yield part + "/stats", torch.stack(stats), z[part + "/stats"], t
    for n, want_lr in c["lr_per_iteration"].items():
        yield f"lr {n}", rates[n], want_lr, 0, tol["lr_relative"]


def pool_after(c, pool, tol):
    "Entries that the training wrote into memory."
    for e in c["pool_after"]:
        x, tag = pool.get(e["movie"], e["timestamp"])
        what = f"pool {e['movie']} {e['timestamp']}"
        yield f"{what} tag", tag, e["loss_tag"], 0, tol["losses_relative"]
        yield f"{what} persons", len(x), len(e["boxes"]), 0
        yield f"{what} mean", x.double().mean().item(), e["feature_mean"], tol["logits_absolute"]
        yield f"{what} std", x.double().std(correction=0).item(), e["feature_std"], tol["logits_absolute"]
