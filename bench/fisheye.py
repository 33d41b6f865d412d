"""Speed of inference over a folder and of augmentation, beside the plain ways.

    make bench PART=fisheye            24 pictures of 1920x1080, D-FINE n at 640

Inference: the loop of transformers' example (open, process, detect, draw,
save, one picture after the other) against `predict` with PyTorch and with
ONNX Runtime; all use the same number of threads. Augmentation: `augment`
against albumentations alone with the same photographic steps, reading and
writing included on both sides. Rounds alternate; medians are compared."""
import argparse
import json
import os
import statistics
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


def plain_loop(model, folder, out, least=.3):
    "transformers' example, picture by picture."
    import torch
    from PIL import Image, ImageDraw
    from transformers import RTDetrImageProcessor
    out.mkdir(parents=True, exist_ok=True)
    proc = RTDetrImageProcessor()
    for p in sorted(folder.iterdir()):
        im = Image.open(p).convert("RGB")
        with torch.no_grad():
            got = model(**proc(images=im, return_tensors="pt"))
        res, = proc.post_process_object_detection(got, target_sizes=[(im.height, im.width)], threshold=least)
        d = ImageDraw.Draw(im)
        for b in res["boxes"].tolist():
            d.rectangle(b, outline="red", width=3)
        im.save(out / p.name, quality=85)


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
    ours, onnx = Detector(ck, device="cpu"), Detector(open_onnx(top / "onnx", threads), device="cpu")
    got, cpu = measure(dict(plain=lambda r: plain_loop(ck.model, folder, top / f"p{r}"),
                            torch=lambda r: predict(ours, folder, top / f"t{r}", 4),
                            onnx=lambda r: predict(onnx, folder, top / f"o{r}", 4)), rounds)
    return {f"infer/{k}, pictures a second": n / v for k, v in got.items()} | {
        "infer/torch over plain": got["plain"] / got["torch"], "infer/onnx over plain": got["plain"] / got["onnx"],
        "infer/torch over plain, CPU": cpu["plain"] / cpu["torch"],
        "infer/onnx over plain, CPU": cpu["plain"] / cpu["onnx"]}


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


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--images", type=int, default=24)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--only", choices=("infer", "augment"))
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as t:
        top = Path(t)
        (top / "pics").mkdir()
        src = pictures(top / "pics", a.images)
        out = {}
        if a.only != "infer":
            out |= augmentation(top, src, a.images, a.rounds)
        if a.only != "augment":
            out |= infer(top, a.images, a.rounds, a.threads)
    out |= dict(images=a.images, threads=a.threads, load=os.getloadavg()[0])
    for k, v in out.items():
        print(f"{k:52} {v:.3g}")
    path = HERE / "results" / "fisheye.json"
    path.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
