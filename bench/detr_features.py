"""Loading beside transformers' fastest processor, and training steps with
kept features beside steps that compute them, with the shape of a ViT-L (random
weights) at 480x768. `PART=detr_features make bench`; one core."""
import datetime
import json
import os
import platform
import tempfile
import time
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import cv2
import numpy as np
import torch
from transformers import DetrImageProcessorPil

from crowdlens.core.augmentation import augment, make_augment
from crowdlens.core.letterbox import Letterbox, letterbox, normalise, to_network
from crowdlens.models import feature_cache as fc
from crowdlens.models.detr import build, random_backbone

torch.set_num_threads(1)
cv2.setNumThreads(1)


def ms(f, n):
    "Mean CPU milliseconds of a call."
    f(0)
    t = time.process_time()
    for k in range(n):
        f(k + 1)
    return 1e3 * (time.process_time() - t) / n


def loading():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    xy = rng.random((85, 2)) * [1800, 1000]
    boxes = np.c_[xy, xy + 40]
    rows = [dict(bbox=[*x, 40.0, 40.0], area=1600.0, category_id=0, iscrowd=0) for x in xy.tolist()]
    target = dict(image_id=1, annotations=rows)
    stock = DetrImageProcessorPil(
        size=dict(max_height=960, max_width=1536), pad_size=dict(height=960, width=1536), do_pad=True
    )
    lay, pipe = Letterbox(), make_augment()

    def theirs(k):
        return stock(images=image, annotations=target, return_tensors="pt")

    def ours(k):
        canvas, place = letterbox(image, lay)
        return normalise(canvas, place), to_network(place, boxes)

    def changed(k):
        canvas, place = letterbox(image, lay)
        h, w = place.valid
        canvas[:h, :w], _, _ = augment(pipe, canvas[:h, :w], place.to_canvas(boxes), (0, k, 0))
        return normalise(canvas, place)

    a, b, c = ms(theirs, 15), ms(ours, 15), ms(changed, 40)
    far = abs(theirs(0)["labels"][0]["boxes"].numpy() - ours(0)[1]).max()
    print(f"1080p to 960x1536, CPU ms: transformers (PIL) {a:.1f}, ours {b:.1f} ({a / b:.1f}x), with augmentation {c:.1f} ({a / c:.1f}x)")
    print(f"boxes differ by at most {far:.1e}; {1e3 / c:.0f} images a second a worker, without decoding")
    return {"transformers (PIL), ms": a, "ours, ms": b, "ours with augmentation, ms": c, "times": a / b,
            "times with augmentation": a / c, "boxes differ, of the canvas": float(far), "images a second a worker": 1e3 / c}


def features(layers, width, heads, batch=1, steps=3):
    vit = random_backbone(dict(model_type="dinov3_vit", hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * width, patch_size=16, num_register_tokens=4))
    model = fc.take_maps(build(vit, num_queries=300)).train()
    x = torch.randn(batch, 3, 480, 768)
    with torch.inference_mode():
        maps = model.model.backbone.maps(x)[-1].clone()
    labels = [dict(class_labels=torch.zeros(80, dtype=torch.long), boxes=torch.rand(80, 4) * 0.3 + 0.2)] * batch
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    with tempfile.TemporaryDirectory() as d:
        cache = fc.FeatureCache(d, batch, 1, maps.shape[1:], "int8", 1e9)
        for i in range(batch):
            cache.put(i, 0, maps[i], np.zeros((0, 4)), [])

        def step(kept):
            v = torch.stack([cache.get(i, 0)[0] for i in range(batch)]) if kept else x
            opt.zero_grad()
            model(pixel_values=v, labels=labels).loss.backward()
            opt.step()

        kept = ms(lambda k: step(True), steps)
        t = time.process_time()
        step(False)
        live = 1e3 * (time.process_time() - t)
    print(f"{layers} layers of {width}: a step {live / 1e3:.2f} s, from kept maps {kept / 1e3:.2f} s: {live / kept:.1f}x")
    return {"layers": layers, "width": width, "step, s": live / 1e3, "step from kept maps, s": kept / 1e3, "times": live / kept}


if __name__ == "__main__":
    out = dict(date=datetime.date.today().isoformat(), cpus=len(os.sched_getaffinity(0)), machine=platform.machine(),
               loading=loading(), cache=[features(12, 384, 6), features(24, 1024, 16)])
    (Path(__file__).parent / "results" / "detr_features.json").write_text(json.dumps(out, indent=1) + "\n")
