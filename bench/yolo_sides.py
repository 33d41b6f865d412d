"""The sides of the YOLO benchmark, each run in a process of its own:
`python bench/yolo_sides.py SIDE FOLDER WORK` prints one JSON line.

Every side parses all label files and learns each image's size from its
header; `seconds` leaves out imports (`total` in the results has them)."""
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path


def bare(root, work):
    "Read the label files and the first 2 KB of each image, nothing else."
    def go():
        n = 0
        for kind in ("labels", "images"):
            for e in os.scandir(f"{root}/{kind}/train"):
                fd = os.open(e.path, os.O_RDONLY)
                n += len(os.read(fd, 2048 if kind == "images" else 1 << 20))
                os.close(fd)
        return {"bytes": n}
    return go


def bare_labels(root, work):
    "Read the label files alone."
    def go():
        n = 0
        for e in os.scandir(f"{root}/labels/train"):
            with open(e.path, "rb") as f:
                n += len(f.read())
        return {"bytes": n}
    return go


def _warm(work):
    "Load the compiled passes, as an import would."
    from crowdlens.core.coco import annotations_json
    from crowdlens.core.yolo import index
    top = Path(work) / "warm"
    shutil.rmtree(top, ignore_errors=True)
    (top / "images").mkdir(parents=True)
    (top / "classes.txt").write_text("a\n")
    (top / "images/a.txt").write_text("0 .5 .5 .1 .1\n0 .1 .1 .2 .1 .2 .2\n")
    (top / "images/a.jpg").write_bytes(b"")
    index(top, out=str(top / "out"))
    annotations_json(1, [1], [0], [[1, 1, 1, 1]])


def index(root, work):
    "crowdlens: the index, from nothing, written to its cache."
    from crowdlens.core.yolo import index
    _warm(work)
    shutil.rmtree(f"{work}/out", ignore_errors=True)

    def go():
        ix = index(root, "train", out=f"{work}/out")
        return {"images": len(ix), "boxes": len(ix.boxes)}
    return go


def reopen(root, work):
    "crowdlens: the index again, nothing having changed."
    from crowdlens.core.yolo import index
    index(root, "train", out=f"{work}/out")

    def go():
        ix = index(root, "train", out=f"{work}/out")
        return {"images": len(ix), "boxes": len(ix.boxes), "read": ix.parsed}
    return go


def convert(root, work):
    "crowdlens: index from nothing and COCO JSON."
    from crowdlens.core.yolo import index
    from crowdlens.yolo2coco import write
    _warm(work)
    shutil.rmtree(f"{work}/out", ignore_errors=True)

    def go():
        ix = index(root, "train", out=f"{work}/out")
        left = write(ix, f"{work}/crowdlens.json")
        return {"images": len(ix), "boxes": len(ix.boxes) - len(left)}
    return go


def audit(root, work):
    "crowdlens: index from nothing and the whole audit without pixels."
    from crowdlens.audit import audit
    _warm(work)
    audit(Path(work) / "warm", pixels=False, out=f"{work}/warm/out2")
    shutil.rmtree(f"{work}/out", ignore_errors=True)
    return lambda: {"flaws": len(audit(root, pixels=False,
                                       out=f"{work}/out").flaws)}


def decode(root, work):
    "Decode every image with OpenCV on all cores, nothing else."
    from concurrent.futures import ThreadPoolExecutor

    import cv2
    import numpy as np
    cv2.setNumThreads(1)
    paths = sorted(Path(f"{root}/images/train").iterdir())

    def one(p):
        return cv2.imdecode(np.fromfile(p, np.uint8), cv2.IMREAD_COLOR).size

    def go():
        with ThreadPoolExecutor(os.cpu_count()) as ex:
            return {"images": len(paths), "bytes": sum(ex.map(one, paths))}
    return go


def audit_pixels(root, work):
    "crowdlens: the whole audit with pixels."
    from crowdlens.audit import audit
    _warm(work)
    audit(Path(work) / "warm", out=f"{work}/warm/out2")
    shutil.rmtree(f"{work}/out", ignore_errors=True)
    return lambda: {"flaws": len(audit(root, out=f"{work}/out").flaws)}


def ultralytics(root, work):
    "ultralytics: the scan before training, its cache removed."
    from ultralytics.data.dataset import YOLODataset
    for p in Path(root).rglob("*.cache"):
        p.unlink()

    def go():
        ds = YOLODataset(img_path=f"{root}/images/train", task="detect",
                         augment=False, data={
                             "names": {0: "person", 1: "head"}, "nc": 2,
                             "channels": 3})
        return {"images": len(ds.labels),
                "boxes": sum(len(x["cls"]) for x in ds.labels)}
    return go


def hotcoco(root, work):
    "hotcoco: from_yolo and save."
    from hotcoco import COCO
    link = Path(work) / "hotcoco_labels"  # it wants data.yaml beside them
    if not link.exists():
        shutil.copytree(f"{root}/labels/train", link)
        shutil.copy(f"{root}/data.yaml", link)

    def go():
        c = COCO.from_yolo(str(link), images_dir=f"{root}/images/train")
        c.save(f"{work}/hotcoco.json")
        return {"images": len(c.imgs), "boxes": len(c.anns)}
    return go


def globox(root, work):
    "globox: from_yolo_v5 and save_coco."
    from globox import AnnotationSet

    def go():
        a = AnnotationSet.from_yolo_v5(folder=f"{root}/labels/train",
                                       image_folder=f"{root}/images/train")
        a.save_coco(f"{work}/globox.json", auto_ids=True)
        return {"images": len(a)}
    return go


def supervision(root, work):
    "supervision: from_yolo and as_coco."
    import supervision as sv

    def go():
        d = sv.DetectionDataset.from_yolo(
            f"{root}/images/train", f"{root}/labels/train",
            f"{root}/data.yaml")
        d.as_coco(annotations_path=f"{work}/supervision.json")
        return {"images": len(d)}
    return go


def script(root, work):
    "A script as one finds on the web: Pillow, split, json.dump."
    from PIL import Image

    def go():
        images, anns = [], []
        for i, p in enumerate(sorted(Path(f"{root}/images/train").iterdir())):
            with Image.open(p) as im:
                W, H = im.size
            images.append({"id": i + 1, "file_name": p.name, "width": W,
                           "height": H})
            with open(f"{root}/labels/train/{p.stem}.txt") as f:
                for line in f:
                    c, cx, cy, w, h = line.split()
                    w, h = float(w) * W, float(h) * H
                    anns.append({
                        "id": len(anns) + 1, "image_id": i + 1,
                        "category_id": int(c), "iscrowd": 0, "area": w * h,
                        "bbox": [float(cx) * W - w / 2,
                                 float(cy) * H - h / 2, w, h]})
        with open(f"{work}/script.json", "w") as f:
            json.dump({"images": images, "annotations": anns, "categories": [
                {"id": 0, "name": "person"}, {"id": 1, "name": "head"}]}, f)
        return {"images": len(images), "boxes": len(anns)}
    return go


def cpu_seconds():
    "CPU time of this process and its finished children, all threads."
    return sum(sum(resource.getrusage(who)[:2]) for who in (
        resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    side, root, work = sys.argv[1:]
    os.makedirs(work, exist_ok=True)
    go = globals()[side](root, work)
    t0, c0 = time.perf_counter(), cpu_seconds()
    got = go()
    print("RESULT " + json.dumps(
        {"seconds": time.perf_counter() - t0, "cpu": cpu_seconds() - c0,
         **got}), flush=True)
