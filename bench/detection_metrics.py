"""Speed and memory of detection figures and of box fusion, beside the peers.

    make bench PART=detection_metrics       1,206 images x 80 objects x 300 boxes

The whole evaluation, per class, at 100 and at 500 boxes an image: torchmetrics
with faster-coco-eval, one run a cap, against `evaluate` (crowd scores
included). Fusion: 3 models x 300 boxes an image against ensemble_boxes, whose
output must be met bit for bit. Each side runs in a process of its own, in
turns; time is wall and CPU, memory the growth of the peak over the data."""
import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import peers

HERE = Path(__file__).resolve().parent


def crowd(path, n, m=80, d=300, seed=0):
    "Arrays of a crowd set: objects, and boxes of a middling detector."
    r = np.random.default_rng(seed)
    gt = np.column_stack([r.uniform(0, 1500, (n * m, 2)), r.uniform(8, 120, (n * m, 2))])
    cat = r.integers(0, 2, n * m)
    near = np.abs(gt + r.normal(0, .08, gt.shape) * np.tile(gt[:, 2:], 2)).reshape(n, m, 4)
    far = np.concatenate([r.uniform(0, 1500, (n, d - m, 2)), r.uniform(8, 120, (n, d - m, 2))], 2)
    det = np.concatenate([near, far], 1)
    score = np.concatenate([r.beta(4, 2, (n, m)), r.beta(1.2, 6, (n, d - m))], 1)
    label = np.concatenate([cat.reshape(n, m), r.integers(0, 2, (n, d - m))], 1)
    np.savez(path, gt=gt.reshape(n, m, 4), cat=cat.reshape(n, m), det=det, score=score, label=label)


def truth(a):
    "The ground truth as crowdlens keeps it."
    from crowdlens.metrics.tables import GroundTruth
    n, m = a["cat"].shape
    box = a["gt"].reshape(-1, 4)
    return GroundTruth(np.arange(n), [""] * n, np.full((n, 2), 1700.), np.arange(2), ["person", "head"],
                       np.repeat(np.arange(n), m), a["cat"].ravel(), box, box[:, 2] * box[:, 3], np.zeros(n * m, bool))


def ours(a):
    from crowdlens.metrics.detection import evaluate
    from crowdlens.metrics.tables import gather
    gt = truth(a)
    xyxy = np.concatenate([a["det"][..., :2], a["det"][..., :2] + a["det"][..., 2:]], 2)
    small = truth({k: v[:2] for k, v in a.items()})
    evaluate(small, gather(small, range(2), xyxy[:2], a["score"][:2], a["label"][:2]))  # compiled before

    def work():
        return evaluate(gt, gather(gt, range(len(xyxy)), xyxy, a["score"], a["label"]))
    return work


def theirs(a):
    import torch
    from torchmetrics.detection import MeanAveragePrecision
    t = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in a.items()}
    preds = [dict(boxes=b, scores=s, labels=c) for b, s, c in zip(t["det"], t["score"], t["label"])]
    target = [dict(boxes=b, labels=c) for b, c in zip(t["gt"], t["cat"])]

    def work():
        out = {}
        for caps in ([1, 10, 100], [1, 10, 500]):
            m = MeanAveragePrecision("xywh", class_metrics=True, backend="faster_coco_eval",
                                     iou_thresholds=np.linspace(.5, .95, 10).tolist(),
                                     rec_thresholds=np.linspace(0, 1, 101).tolist(), max_detection_thresholds=caps)
            m.warn_on_many_detections = False
            m.update(preds, target)
            got = m.compute()
            out |= {"map" if caps[2] == 100 else "map_500": float(got["map"]), f"mar_{caps[2]}": float(got[f"mar_{caps[2]}"])}
            for name, v in zip(("person", "head"), got["map_per_class"]):
                out["map/" + name if caps[2] == 100 else "map_500/" + name] = float(v)
        return out
    return work


def three(n, seed=0):
    "Boxes of three models on n images, as wbf takes them."
    r = np.random.default_rng(seed)
    for _ in range(n):
        lo = r.uniform(0, .9, (120, 2))
        base, c = np.hstack([lo, lo + r.uniform(.01, .08, lo.shape)]), r.integers(0, 5, 120)
        pick = [np.concatenate([np.arange(120), r.integers(0, 120, 180)]) for _ in range(3)]
        yield ([np.clip(base[p] + r.normal(0, .006, (300, 4)), 0, 1) for p in pick],
               [r.random(300) for _ in pick], [c[p] for p in pick])


def fusion_side(n, block=15):
    "Milliseconds an image, in turns of 15 images; fails when a bit differs."
    from ensemble_boxes import weighted_boxes_fusion

    from crowdlens.core.fusion import fuse, wbf
    warnings.simplefilter("ignore")
    cases = list(three(n))
    wbf(*cases[0])
    t, got = {wbf: [], weighted_boxes_fusion: []}, {wbf: [], weighted_boxes_fusion: []}
    for i in range(0, n, block):
        for f in t:
            t0 = time.process_time()
            got[f] += [f(*c) for c in cases[i:i + block]]
            t[f].append((time.process_time() - t0) / block * 1e3)
    for x, y in zip(*got.values()):
        assert all((a == b).all() for a, b in zip(x, y)), "a bit differs"
    lists = [[dict(image_id=i, category_id=int(k), score=float(s), bbox=[*b[:2].tolist(), *(b[2:] - b[:2]).tolist()])
              for i, c in enumerate(cases) for b, s, k in zip(c[0][m], c[1][m], c[2][m])] for m in range(3)]
    t0 = time.process_time()
    fuse(lists, sizes={i: (1, 1) for i in range(n)})
    whole = (time.process_time() - t0) / n * 1e3
    return {"wbf, ms": statistics.median(t[wbf]), "ensemble_boxes, ms": statistics.median(t[weighted_boxes_fusion]),
            "fuse from COCO lists, ms": whole}


def side(name, path):
    "Run one side and print its time, memory and figures."
    if name == "fusion":
        return print(json.dumps(fusion_side(60)))
    with np.load(path) as z:
        a = {k: z[k] for k in z.files}
    work = dict(ours=ours, theirs=theirs)[name](a)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    t0, c0 = time.perf_counter(), time.process_time()
    got = work()
    wall, cpu = time.perf_counter() - t0, time.process_time() - c0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(dict(wall=wall, cpu=cpu, mb=(peak - base) / 1024, figures=got)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=1206)
    p.add_argument("--turns", type=int, default=2, help="runs of each side")
    p.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        return side(*a.side)
    py, runs = peers.python("detection"), dict(theirs=[], ours=[])

    def run(*what):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        got = subprocess.run([py, __file__, "--side", *what], check=True, capture_output=True, text=True, env=env)
        return json.loads(got.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory() as tmp:
        data = f"{tmp}/crowd.npz"
        crowd(data, a.images)
        for _ in range(a.turns):
            for name in runs:
                runs[name].append(run(name, data))
                print(name, {k: round(v, 2) for k, v in runs[name][-1].items() if k != "figures"}, flush=True)
        fused = run("fusion", data)
    want, got = runs["theirs"][0]["figures"], runs["ours"][0]["figures"]
    err = max(abs(got[k] - v) for k, v in want.items())
    assert err < 1e-6, f"figures differ by {err}"
    med = {n: {k: statistics.median(r[k] for r in rs) for k in ("wall", "cpu", "mb")} for n, rs in runs.items()}
    ratio = {k: med["theirs"][k] / med["ours"][k] for k in ("wall", "cpu", "mb")}
    fused["times as fast"] = fused["ensemble_boxes, ms"] / fused["wbf, ms"]
    out = dict(date=datetime.date.today().isoformat(), cpus=os.cpu_count(), machine=platform.machine(), images=a.images,
               evaluation=med, ratio=ratio, largest_difference=err, fusion=fused)
    dst = HERE / "results"
    dst.mkdir(exist_ok=True)
    (dst / "detection_metrics.json").write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
