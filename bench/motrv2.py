"""MOTRv2's speed: `make bench PART=motrv2`, or `python bench/motrv2.py [track|tune] [H W]`.

`track` follows a few frames at 800x1422 with the network as it is and with a
plain implementation kept here: position encodings made anew for each frame,
all sampled values of all levels in one tensor, norms on their own. Same
weights, same ids. `tune` times one clip with the shared vector alone and with
everything learning, and counts what autograd keeps. Seconds of all threads'
work stand beside those of the clock, for machines that do other things
meanwhile. Results go to bench/results/motrv2.json."""
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from crowdlens.models import motrv2, motrv2_loss, motrv2_training
from crowdlens.models import motrv2_transformer as parts

PARTS = {}


def timed(name, fn):
    "`fn`, its time added to a part."
    def run(*a, **k):
        t = time.perf_counter()
        out = fn(*a, **k)
        PARTS[name] = PARTS.get(name, 0) + time.perf_counter() - t
        return out
    return run


def plain_points(value, shapes, places, weights):
    "All samples of all levels in one tensor, then weighted and summed."
    B, S, H, D = value.shape
    Q, L, P = places.shape[1], places.shape[3], places.shape[4]
    got = []
    for l, v in enumerate(value.split([h * w for h, w in shapes], 1)):
        h, w = shapes[l]
        v = v.flatten(2).transpose(1, 2).reshape(B * H, D, h, w)
        grid = (2 * places - 1)[:, :, :, l].transpose(1, 2).flatten(0, 1)
        got.append(F.grid_sample(v, grid, align_corners=False))
    w = weights.transpose(1, 2).reshape(B * H, 1, Q, L * P)
    return (torch.stack(got, -2).flatten(-2) * w).sum(-1).view(B, H * D, Q).transpose(1, 2)


def weights(m):
    "Random weights that give tracks: finite, and some scores above a half."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if p.ndim > 1 and "embed.weight" not in n and "position" not in n:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** .5)
            if n.startswith("class_embed") and p.ndim == 1:
                p.fill_(1.)
        m.position.weight.copy_(torch.rand(m.position.weight.shape, generator=g) * .4 + .2)
        for h in m.bbox_embed:
            h.layers[-1].weight.mul_(.05)
    return m.eval()


def scene(h, w, n, people=12):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (h, w, 3), np.uint8) for _ in range(n)]
    box = np.c_[rng.uniform(.1, .9, (people, 2)), rng.uniform(.02, .1, (people, 1)), rng.uniform(.1, .3, (people, 1)),
                rng.random(people)]
    return frames, [box] * n


def follow(m, frames, props):
    "Tracks, seconds a frame without the first."
    PARTS.clear()
    out, t = [], []
    for x in m.track(frames, props, size_rule=(min(frames[0].shape[:2]), 10**6)):
        out.append(x.ids.tolist())
        t.append((time.perf_counter(), time.process_time()))
    wall, cpu = ((b - a) / (len(t) - 1) for a, b in zip(t[0], t[-1]))
    return out, wall, cpu, {k: round(v / len(t), 3) for k, v in PARTS.items()}


def track(h=800, w=1422, n=3):
    from crowdlens.models.lean import lean
    m = weights(motrv2.MOTRv2())
    frames, props = scene(h, w, n)
    sample, fold, see = parts.sample_points, motrv2.folded, motrv2.MOTRv2.see
    motrv2.MOTRv2.see = timed("image side", see)
    m.transformer.encode = timed("encoder", m.transformer.encode)
    m.transformer.decode = timed("decoder", m.transformer.decode)
    parts.sample_points, motrv2.folded = timed("sampling", plain_points), lambda net: net
    places = m.transformer.places
    m.transformer.places = lambda *a: (m.transformer._places.clear(), places(*a))[1]
    old = follow(m, frames, props)
    parts.sample_points, motrv2.folded, m.transformer.places = timed("sampling", sample), fold, places
    new = follow(lean(m), frames, props)
    ids = {i for f in new[0] for i in f}
    return dict(size=[h, w], frames=n, threads=torch.get_num_threads(), plain=round(old[1], 2), ours=round(new[1], 2),
                faster=round(old[1] / new[1], 2), plain_cpu=round(old[2], 2), ours_cpu=round(new[2], 2),
                faster_cpu=round(old[2] / new[2], 2), same_ids=old[0] == new[0], tracks=len(ids), plain_parts=old[3],
                our_parts=new[3])


def tune(h=400, w=711, frames=2):
    m = weights(motrv2.MOTRv2()).train()
    ims, props = scene(h, w, frames)
    clip = motrv2_loss.Clip(ims, props, [p[:, :4] for p in props], [np.arange(len(p)) for p in props])
    out = {}
    for only in (True, False):
        motrv2_training.choose(m, only)
        name, t, c = "embed_only" if only else "full", time.perf_counter(), time.process_time()
        motrv2_loss.clip_loss(m, clip, embed_only=only).total.backward()
        out[name], out[name + "_cpu"] = round(time.perf_counter() - t, 2), round(time.process_time() - c, 2)
    one = motrv2_loss.Clip(ims[:1], props[:1], clip.boxes[:1], clip.ids[:1])
    for only in (True, False):
        motrv2_training.choose(m, only)
        n = motrv2_training.held_bytes(m, lambda: motrv2_loss.clip_loss(m, one, embed_only=only).total)
        out[("embed_only" if only else "full") + "_MB_a_frame"] = round(n / 1e6, 1)
    return dict(size=[h, w], frames=frames, threads=torch.get_num_threads(),
                share=round(out["embed_only"] / out["full"], 2),
                share_cpu=round(out["embed_only_cpu"] / out["full_cpu"], 2), **out)


def main(parts=("track", "tune"), size=()):
    file = Path(__file__).resolve().parent / "results/motrv2.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    for p in parts:
        kept[p] = dict(date=datetime.date.today().isoformat(), cpus=os.cpu_count(), machine=platform.machine(),
                       load=round(os.getloadavg()[0], 1)) | dict(track=track, tune=tune)[p](*size)
        if not size:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(kept, indent=1) + "\n")
        print(p, json.dumps(kept[p], indent=1))


if __name__ == "__main__":
    part, *size = sys.argv[1:] or [None]
    main((part,) if part else ("track", "tune"), tuple(map(int, size)))
