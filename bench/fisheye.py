"""Stage 04's speed beside what one would take otherwise, every goal in one run.

    make bench PART=fisheye            24 pictures of 1920x1080, D-FINE n at 640

Fusion: `wbf` and `fuse` against ensemble_boxes, one thread, bit-equal.
Criterion: the loss and its gradient for D-FINE-L at 640 with 100 objects
against transformers' own. Augmentation: `augment` against albumentations alone
with the same photographic steps, reading and writing on both sides. Inference:
the loop of transformers' example (open, process, detect, draw, save, one
picture after the other) against `predict` with PyTorch and with ONNX Runtime,
the same number of threads, and the boxes of each. Sides take turns; medians
are compared, of wall time and of CPU time: where the machine does other work
meanwhile (`load`), the latter is the one to trust."""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
warnings.simplefilter("ignore")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import cv2  # noqa: E402
import numpy as np  # noqa: E402


def pictures(top, n, w=1920, h=1080):
    "Pictures with large and small detail, as JPEG, and a COCO file of boxes."
    rng = np.random.default_rng(0)
    ims, anns = [], []
    for k in range(1, n + 1):
        im = cv2.resize(rng.integers(0, 255, (h // 40, w // 40, 3), np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
        im = cv2.add(im, rng.integers(0, 24, im.shape, np.uint8))
        for j in range(20):
            x, y = rng.integers(0, w - 90), rng.integers(0, h - 90)
            s = rng.integers(20, 80)
            im[y : y + s, x : x + s] = rng.integers(0, 255, 3)
            anns.append(dict(id=len(anns) + 1, image_id=k, category_id=int(j % 2), bbox=[int(x), int(y), int(s), int(s)]))
        cv2.imwrite(str(top / f"camera1_A_{k}.jpg"), im)
        ims.append(dict(id=k, file_name=f"camera1_A_{k}.jpg", width=w, height=h))
    src = top.parent / "in.json"
    src.write_text(json.dumps(dict(images=ims, annotations=anns,
                                   categories=[dict(id=0, name="Bus"), dict(id=1, name="Car")])))
    return src


def network():
    "A D-FINE n with weights that give no ties, and its checkpoint."
    import torch
    from transformers import DFineForObjectDetection

    from crowdlens.core.class_names import COCO_NAMES
    from crowdlens.core.coco import LabelMap
    from crowdlens.core.letterbox import Letterbox
    from crowdlens.models.checkpoints import Checkpoint
    from crowdlens.models.dfine import size_config
    torch.manual_seed(0)
    m = DFineForObjectDetection(size_config("n", COCO_NAMES)).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.dim() > 1:
                p += .3 * p.std() * torch.randn_like(p)
    names = [m.config.id2label[i] for i in range(m.config.num_labels)]
    return Checkpoint(m, LabelMap.make(names), Letterbox(640, 640, 32, "stretch"), (0., 0, 0), (1., 1, 1))


def plain_loop(model, folder, out, least):
    "transformers' example, picture by picture; boxes (n,4) of each file."
    import torch
    from PIL import Image, ImageDraw
    from transformers import RTDetrImageProcessor
    out.mkdir(parents=True, exist_ok=True)
    proc, found = RTDetrImageProcessor(), {}
    for p in sorted(folder.iterdir()):
        im = Image.open(p).convert("RGB")
        with torch.no_grad():
            got = model(**proc(images=im, return_tensors="pt"))
        res, = proc.post_process_object_detection(got, target_sizes=[(im.height, im.width)], threshold=least)
        d = ImageDraw.Draw(im)
        for b in res["boxes"].tolist():
            d.rectangle(b, outline="red", width=3)
        im.save(out / p.name, quality=85)
        found[p.name] = res["boxes"].numpy()
    return found


def score_of_box(model, folder, k=15):
    "The score of the `k`-th best box of the first picture: an untrained network's are low."
    import torch
    from PIL import Image
    from transformers import RTDetrImageProcessor
    with torch.no_grad():
        out = model(**RTDetrImageProcessor()(images=Image.open(min(folder.iterdir())), return_tensors="pt"))
    return out.logits.sigmoid().flatten().sort(descending=True).values[k].item()


def agreement(want, folder, least):
    "Share of the plain loop's boxes that `predict` has within half a pixel."
    ims = {m["id"]: m["file_name"] for m in json.loads((folder / "images.json").read_text())["images"]}
    got = {n: [] for n in want}
    for r in json.loads((folder / "results.json").read_text()):
        if r["score"] >= least - 1e-3:
            x, y, w, h = r["bbox"]
            got[ims[r["image_id"]]].append((x, y, x + w, y + h))
    hit = n = 0
    for name, b in want.items():
        mine = np.array(got[name]).reshape(-1, 4)
        for x in b.clip(0, (1920, 1080) * 2):
            hit += len(mine) > 0 and np.abs(mine - x).max(1).min() < .5
            n += 1
    return hit / n


def measure(sides, rounds):
    "Median seconds of each side, in turns: wall, and CPU of all threads."
    t = {k: [] for k in sides}
    for r in range(rounds + 1):
        for k, f in sides.items():
            t0, c0 = time.perf_counter(), time.process_time()
            f(r)
            if r:
                t[k].append((time.perf_counter() - t0, time.process_time() - c0))
    return [{k: statistics.median(x[i] for x in v) for k, v in t.items()} for i in (0, 1)]


def infer(top, n, rounds, threads):
    import torch

    from crowdlens.models.detect_files import predict
    from crowdlens.models.detector import Detector
    from crowdlens.models.export import export, open_onnx
    torch.set_num_threads(threads)
    folder = top / "pics"
    ck = network()
    export(ck, top / "onnx", tolerance=1e9)  # untrained: which queries are chosen is a tie
    ours, onnx = Detector(ck, device="cpu"), Detector(open_onnx(top / "onnx"), device="cpu")
    least, found = score_of_box(ck.model, folder), {}
    sides = dict(plain=lambda r: found.update(plain_loop(ck.model, folder, top / f"p{r}", least)),
                 torch=lambda r: predict(ours, folder, top / f"t{r}", 4, least),
                 onnx=lambda r: predict(onnx, folder, top / f"o{r}", 4, least))
    got, cpu = measure(sides, rounds)
    out = {f"infer/{k}, pictures a second": n / v for k, v in got.items()}
    for k in ("torch", "onnx"):
        out |= {f"infer/{k} over plain": got["plain"] / got[k], f"infer/{k} over plain, CPU": cpu["plain"] / cpu[k]}
    # here the choice of queries is a tie for an untrained network: ONNX's boxes are compared on the trained one that ships
    return out | {"infer/torch, boxes as plain": agreement(found, top / "t1", least),
                  "infer/onnx, boxes as torch": both_ways(top, folder)}


def both_ways(top, folder, least=.05):
    "Share of the boxes of the street's detector that ONNX Runtime has within half a pixel."
    from crowdlens.core import runs
    from crowdlens.models import checkpoints
    from crowdlens.models.detect_files import predict
    from crowdlens.models.detector import Detector
    from crowdlens.models.export import export, open_onnx
    ck = checkpoints.open(runs.shipped("street"))
    export(ck, top / "street")
    for name, net in (("s", ck), ("so", open_onnx(top / "street"))):
        predict(Detector(net, device="cpu"), folder, top / name, 4, least)
    want = {}
    for p in folder.iterdir():
        want[p.name] = np.zeros((0, 4))
    ims = {m["id"]: m["file_name"] for m in json.loads((top / "s" / "images.json").read_text())["images"]}
    for r in json.loads((top / "s" / "results.json").read_text()):
        if r["score"] >= least:
            x, y, w, h = r["bbox"]
            want[ims[r["image_id"]]] = np.r_[want[ims[r["image_id"]]], [[x, y, x + w, y + h]]]
    print(sum(map(len, want.values())), "boxes compared")
    return agreement(want, top / "so", least)


def augmentation(top, src, n, rounds):
    from crowdlens.core.fisheye_augment import Changes, augment, photo_steps
    folder, c = top / "pics", Changes(weather=0, relight=0, paste=.4)
    cv2.setNumThreads(1)

    def alone(r):
        pipe = photo_steps(c.photo, 0)
        out = top / f"b{r}"
        out.mkdir()
        for k, p in enumerate(sorted(folder.iterdir())):
            im = cv2.imread(str(p))[..., ::-1]
            for j in range(2):
                pipe.set_random_seed(100 * k + j)
                got = pipe(image=np.ascontiguousarray(im))["image"]
                cv2.imwrite(str(out / f"{p.stem}_{j}.jpg"), got[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])

    got, cpu = measure(dict(ours=lambda r: augment(folder, src, top / f"a{r}", 2, changes=c, validation=0, originals=False),
                            alone=alone), rounds)
    return {f"augment/{k}, pictures a second": 2 * n / v for k, v in got.items()} | {
        "augment/time over albumentations alone": got["ours"] / got["alone"],
        "augment/CPU over albumentations alone": cpu["ours"] / cpu["alone"]}


def fusion():
    "In the environment that has ensemble_boxes; fails where a bit differs."
    import detection_metrics as dm
    r = subprocess.run([dm.peers.python("detection"), dm.__file__, "--side", "fusion", "-"], check=True, capture_output=True,
                       text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    got = json.loads(r.stdout.splitlines()[-1])
    return {f"fuse/{k}": v for k, v in got.items()} | {"fuse/times as fast": got["ensemble_boxes, ms"] / got["wbf, ms"]}


def criterion():
    import dfine
    return {f"criterion/{k}": v for k, v in dfine.main().items()}


GOALS = {"fuse/times as fast": ">= 30", "criterion/times as fast": ">= 1",
         "augment/CPU over albumentations alone": "<= 1.3", "augment/time over albumentations alone": "<= 1.3",
         "infer/torch over plain": ">= 1.15", "infer/onnx over plain": ">= 1.5",
         "infer/torch, boxes as plain": ">= 0.99", "infer/onnx, boxes as torch": ">= 0.99"}
PARTS = ("fuse", "criterion", "augment", "infer")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--images", type=int, default=24)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--only", choices=PARTS, action="append", help="a part; the others keep what they measured")
    a = ap.parse_args()
    path = HERE / "results" / "fisheye.json"
    out = json.loads(path.read_text()) if path.exists() and a.only else {}
    note = dict(date=datetime.date.today().isoformat(), cpus=os.cpu_count(), machine=platform.machine(),
                command="bench/fisheye.py " + " ".join(sys.argv[1:]), images=a.images, rounds=a.rounds, threads=a.threads)
    with tempfile.TemporaryDirectory() as t:
        top = Path(t)
        (top / "pics").mkdir()
        src = pictures(top / "pics", a.images)
        parts = dict(fuse=fusion, criterion=criterion, augment=lambda: augmentation(top, src, a.images, a.rounds),
                     infer=lambda: infer(top, a.images, a.rounds, a.threads))
        for part in a.only or PARTS:
            load = os.getloadavg()[0]
            got = parts[part]()
            out = {k: v for k, v in out.items() if not k.startswith(part + "/")} | got
            out[f"{part}/measured"] = note | dict(load=[round(load, 1), round(os.getloadavg()[0], 1)])
            for k, v in got.items():
                print(f"{k:46} {v:8.3g}  {'goal ' + GOALS[k] if k in GOALS else ''}", flush=True)
            path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
