"""A training step beside transformers' plain recipe: the shape of a ViT-S with
random weights, 480x768, batch 2, 300 queries, 80 objects an image. Same weights
and same losses; CPU seconds of a step and memory, each change by itself on the
plain recipe and all of them. `PART=detr_training make bench`; one core, 4 minutes
when nothing else runs."""
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

SIZE, BATCH, OBJECTS = (480, 768), 2, 80
SAYS = dict(
    plain="transformers' recipe",
    backbone="no block's output kept, one norm instead of thirteen",
    loss="matching image by image, all layers at once",
    loading="letterbox and normalising of our own",
    products="products by oneDNN",
    mlp="insides of layers made again in the backward pass",
    ours="all of them",
)


def scene(k):
    "A smooth picture of 1080p and the boxes on it, in pixels."
    import cv2

    rng = np.random.default_rng(k)
    xy = rng.random((OBJECTS, 2)) * [1800, 1000]
    small = rng.integers(0, 256, (27, 48, 3), dtype=np.uint8)
    return cv2.resize(small, (1920, 1080), interpolation=cv2.INTER_CUBIC), np.c_[xy, xy + 40 + 40 * rng.random((OBJECTS, 2))]


def network(kind):
    "The model with one change, with none, or with all."
    from torch import nn
    from transformers import DetrForObjectDetection
    from transformers.models.detr.modeling_detr import DetrMLP

    from crowdlens.models import detr, lean, matching

    vit = detr.random_backbone(
        dict(model_type="dinov3_vit", hidden_size=384, intermediate_size=1536, num_hidden_layers=12,
             num_attention_heads=6, patch_size=16, num_register_tokens=4, pos_embed_rescale=None)
    )
    model = detr.build(vit, num_queries=300, dropout=0.0)
    if kind == "ours":
        return model
    plain = DetrForObjectDetection(model.config)
    plain.load_state_dict(model.state_dict())
    plain.model.freeze_backbone()
    if kind == "backbone":
        plain.model.backbone.__class__ = detr.FrozenEncoder
    if kind == "loss":
        plain.loss_function = matching.detr_loss
    for m in plain.modules():
        if kind == "products" and type(m) is nn.Linear:
            m.__class__ = lean.FastLinear
        if kind == "mlp" and type(m) is DetrMLP:
            m.__class__ = lean.LeanMLP
    return plain


def batches(kind):
    "A function that loads the k-th batch."
    import torch
    from transformers import DetrImageProcessorPil

    from crowdlens.core.letterbox import Letterbox, letterbox, normalise, to_network

    box, (h, w) = Letterbox(*SIZE), SIZE
    stock = DetrImageProcessorPil(size=dict(max_height=h, max_width=w), pad_size=dict(height=h, width=w), do_pad=True)

    def load(k):
        its = [scene(k * BATCH + i) for i in range(BATCH)]
        t = time.process_time()
        if kind in ("loading", "ours"):
            got = [(letterbox(im, box), b) for im, b in its]
            px = torch.from_numpy(np.stack([normalise(c, p) for (c, p), _ in got]))
            boxes = [torch.from_numpy(to_network(p, b)).float() for (_, p), b in got]
        else:
            rows = [
                dict(image_id=i, annotations=[
                    dict(bbox=[x, y, X - x, Y - y], area=1.0, category_id=0, iscrowd=0) for x, y, X, Y in b.tolist()
                ])
                for i, (_, b) in enumerate(its)
            ]
            enc = stock(images=[im for im, _ in its], annotations=rows, return_tensors="pt")
            px, boxes = enc["pixel_values"], [l["boxes"].float() for l in enc["labels"]]
        labels = [dict(boxes=b, class_labels=torch.zeros(len(b), dtype=torch.long)) for b in boxes]
        return dict(pixel_values=px, labels=labels), time.process_time() - t

    return load


def peak(f):
    "Most bytes of tensors that lived at once during `f`, beyond those before it."
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    sizes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum(sizes).max())


def one(kind, steps=3):
    "One line: losses, CPU seconds of a step, memory."
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    model, load = network(kind).train(), batches(kind)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    losses, secs = [], []

    def step(k):
        batch, spent = load(k)
        t = time.process_time()
        loss = model(**batch).loss
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        losses.append(loss.item())
        secs.append(time.process_time() - t + spent)

    for k in range(steps):
        step(k)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    held = peak(lambda: step(steps)) / 1e6
    print(json.dumps(dict(kind=kind, losses=losses, seconds=float(min(secs[1:steps])), tensors_mb=held, process_mb=rss)))


def keep(rows):
    "Leave the figures in bench/results."
    import datetime
    import platform
    from pathlib import Path

    out = dict(date=datetime.date.today().isoformat(), cpus=len(os.sched_getaffinity(0)), machine=platform.machine(),
               shape=f"ViT-S, {SIZE[0]}x{SIZE[1]}, batch {BATCH}, 300 queries, {OBJECTS} objects", rows=rows)
    (Path(__file__).parent / "results" / "detr_training.json").write_text(json.dumps(out, indent=1) + "\n")


def main(kinds):
    env = dict(os.environ, OMP_NUM_THREADS="1", NO_ALBUMENTATIONS_UPDATE="1")
    rows = []
    for k in kinds:
        out = subprocess.run([sys.executable, __file__, "one", k], env=env, stdout=subprocess.PIPE, check=True, text=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        a, r = rows[0], rows[-1]
        off = max(abs(x - y) / x for x, y in zip(a["losses"], r["losses"]))
        print(
            f"{SAYS[k]:52s} {r['seconds']:6.2f} s {r['seconds'] / a['seconds']:5.2f}x  tensors {r['tensors_mb']:5.0f} MB "
            f"{r['tensors_mb'] / a['tensors_mb']:5.2f}x  process {r['process_mb']:5.0f} MB {r['process_mb'] / a['process_mb']:5.2f}x  "
            f"losses within {off:.0e}", flush=True,
        )
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2])
    else:
        rows = main(sys.argv[1:] or SAYS)
        if not sys.argv[1:]:
            keep(rows)
