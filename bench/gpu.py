"""Speed and memory of the four networks on a GPU: `PART=gpu make bench`, or
`python3 bench/gpu.py [--tiny] [--to FILE] [--parts detr,dfine,…]`.

Imports torch, transformers, numpy and crowdlens; torchvision and scipy where a
network needs them. Needs no file, no download and nobody who watches, and ends
within ten minutes: what does not fit into that time, or cannot be imported, is
a row that says so. All weights are random, for they change no time. A row is
the median over steps of a few seconds after a warm-up. Without a GPU, or with
--tiny, it runs small shapes: these show that it works, and no speed."""
import argparse
import datetime
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOP), str(TOP / "bench")]
LIMIT = 570  # seconds in all
CARD = 20e9  # bytes of the card that the training plan names

# Libraries that the modules below import and that nothing measured here calls.
UNUSED = "fastcore orjson av hotcoco albumentations supervision simplejpeg pydantic ruamel trackio matplotlib filelock tqdm".split()


class Absent(types.ModuleType):
    "A library that is not there: may be imported, cannot be used."
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*a, **k):
            raise ImportError(f"{self.__name__}.{name} is not installed here")
        return missing


def patch(f=None, as_prop=False, **kw):
    "What fastcore's `patch` does: a function becomes a method of its first parameter's class."
    if f is None:
        return lambda f: patch(f, as_prop)
    setattr(next(iter(f.__annotations__.values())), f.__name__, property(f) if as_prop else f)
    return sys._getframe(1).f_globals.get(f.__name__)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Finds libraries of UNUSED when nothing else does."
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        if module.__name__ == "fastcore.basics":
            module.patch = patch


sys.meta_path.append(StandIns())

import numpy as np  # noqa: E402
import torch  # noqa: E402

GPU = torch.cuda.is_available()
DEV = torch.device("cuda" if GPU else "cpu")
T0 = time.perf_counter()


def left():
    "Seconds that remain."
    return LIMIT - (time.perf_counter() - T0)


def sync():
    if GPU:
        torch.cuda.synchronize()


def clock(step, images, seconds):
    "Images a second, and the largest memory in bytes."
    for _ in range(2):
        step()
    sync()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    times, end = [], time.perf_counter() + seconds
    while not times or (time.perf_counter() < end and len(times) < 200):
        t = time.perf_counter()
        step()
        sync()
        times.append(time.perf_counter() - t)
    peak = torch.cuda.max_memory_allocated() if GPU else None
    return images / statistics.median(times), peak, len(times)


def half(on=True):
    return torch.autocast(DEV.type, torch.bfloat16, enabled=on and GPU)


def targets(batch, n, classes):
    g = torch.Generator().manual_seed(0)
    return [dict(class_labels=torch.randint(0, classes, (n,), generator=g).to(DEV),
                 boxes=(torch.rand(n, 4, generator=g) * .3 + .2).to(DEV)) for _ in range(batch)]


def learner(params, loss):
    "A whole training step."
    params = [p for p in params if p.requires_grad]
    opt = torch.optim.AdamW(params, 1e-5)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, .1)
        opt.step()
        opt.zero_grad(set_to_none=True)
    return step


def looker(forward):
    def step():
        with torch.inference_mode(), half():
            forward()
    return step


def detr(tiny):
    "Stage 03: DETR on a frozen DINOv3."
    from crowdlens.models import detr as d
    spec = "tiny" if tiny else dict(model_type="dinov3_vit", hidden_size=1024, intermediate_size=4096,
                                    num_hidden_layers=24, num_attention_heads=16, patch_size=16, num_register_tokens=4)
    h, w = (64, 96) if tiny else (960, 1536)
    name = f"{'toy' if tiny else 'ViT-L/16'} {h}x{w}"
    m = d.build(d.random_backbone(spec), num_queries=30 if tiny else 300, **(dict(
        encoder_layers=1, decoder_layers=2, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32) if tiny else {})).to(DEV)
    x, y = torch.randn(2, 3, h, w, device=DEV), targets(2, 5 if tiny else 85, 2)

    def loss():
        with half():
            return m(pixel_values=x, labels=y).loss
    m.train()
    yield name, "training, batch 2, backbone frozen", lambda s: clock(learner(m.parameters(), loss), 2, s)
    m.eval()
    yield name, "inference, batch 2", lambda s: clock(looker(lambda: m(pixel_values=x)), 2, s)
    x8 = x.repeat(4, 1, 1, 1)
    yield name, "inference, batch 8", lambda s: clock(looker(lambda: m(pixel_values=x8)), 8, s)


def dfine(tiny):
    "Stage 04: D-FINE."
    from transformers import DFineForObjectDetection

    from crowdlens.core.class_names import COCO_NAMES
    from crowdlens.models import dfine as d
    from crowdlens.models.dfine_criterion import LossModel
    letter = "n" if tiny else "l"
    for px, batch in ((96, 2),) if tiny else ((640, 16), (1280, 4)):
        small = dict(num_queries=30, num_denoising=10) if tiny else {}
        m = DFineForObjectDetection(d.size_config(letter, COCO_NAMES, **small)).to(DEV).train()
        name, crit = f"D-FINE-{letter.upper()} {px}x{px}", LossModel(m)
        x, y = torch.rand(batch, 3, px, px, device=DEV), targets(batch, 3 if tiny else 30, 80)
        kind = torch.bfloat16 if GPU else None
        yield name, f"training, batch {batch}", lambda s: clock(
            learner(m.parameters(), lambda: sum(crit(x, y, kind).values())), batch, s)
        m.eval()
        for n in (1, batch):
            z = x[:n]
            yield name, f"inference, batch {n}", lambda s: clock(looker(lambda: m(pixel_values=z)), n, s)
        if tiny:
            continue
        quick = torch.compile(m)
        yield name, f"inference, batch {batch}, compiled", lambda s: clock(looker(lambda: quick(pixel_values=x)), batch, s)
        yield name, "inference, batch 1, ONNX Runtime", lambda s: runtime(m, px, s)
        del m, crit, quick


def runtime(m, px, seconds):
    "The same network in ONNX Runtime."
    import tempfile

    import onnxruntime as ort
    m = m.float().cpu().eval()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ImportError("ONNX Runtime without CUDA")

    class Plain(torch.nn.Module):
        def forward(self, x):
            out = m(pixel_values=x)
            return out.logits, out.pred_boxes
    x = torch.rand(1, 3, px, px)
    with tempfile.TemporaryDirectory() as top, torch.no_grad():
        path = f"{top}/m.onnx"
        torch.onnx.export(Plain(), (x,), path, opset_version=17, dynamo=False, input_names=["x"])
        s = ort.InferenceSession(path, providers=["CUDAExecutionProvider"])
        feed = {"x": x.numpy()}
        got = clock(lambda: s.run(None, feed), 1, seconds)
    return got[0], None, got[2]  # its memory is not torch's


def motr(tiny):
    "Stage 05: MOTRv2."
    import motrv2 as bench
    from crowdlens.models import motrv2, motrv2_loss, motrv2_training
    h, w = (64, 96) if tiny else (800, 1333)
    m = bench.weights(motrv2.MOTRv2(motrv2.SMALL) if tiny else motrv2.MOTRv2()).to(DEV)
    frames, props = bench.scene(h, w, 3 if tiny else 12)
    name = f"MOTRv2 {h}x{w}"

    def follow(s):
        rates = []
        for _ in range(1 if tiny else 3):
            t = []
            for _ in m.track(frames, props, size_rule=(h, max(h, w))):
                sync()
                t.append(time.perf_counter())
            rates.append((len(t) - 1) / (t[-1] - t[0]))
        return statistics.median(rates), torch.cuda.max_memory_allocated() if GPU else None, len(frames)
    yield name, "tracking, fp32, frames", follow
    n = 2 if tiny else 5
    clip = motrv2_loss.Clip(frames[:n], props[:n], [p[:, :4] for p in props[:n]], [np.arange(len(p)) for p in props[:n]])
    m.train()
    motrv2_training.choose(m, True)
    yield name, f"tuning of the embedding, fp32, clips of {n} frames", lambda s: clock(
        lambda: motrv2_loss.clip_loss(m, clip, embed_only=True).total.backward(), 1, s)


def slowfast(tiny):
    "Stage 06: SlowFast."
    from crowdlens.models import action_training as at
    from crowdlens.models import slowfast as sf
    from crowdlens.models.action_loss import Group
    cfg = sf.ActionConfig(sf.TINY, (Group("all", 5, False, 5.),), 32) if tiny else sf.ActionConfig()
    m = sf.fresh(cfg).to(DEV)
    p, n = cfg.pathways if hasattr(cfg, "pathways") else sf.R50, 5
    h, w = (64, 96) if tiny else (256, 464)
    classes, batch = sum(g.size for g in cfg.groups), 1 if tiny else 4
    fast = torch.randn(batch, 3, p.frames * p.alpha // p.tau, h, w)
    slow = fast[:, :, ::p.alpha].contiguous()
    boxes = np.float32([[20 + 8 * i, 10, 50 + 8 * i, h - 10] for i in range(n)])
    b = dict(slow=slow, fast=fast, boxes=[boxes] * batch, sizes=[(h, w)] * batch,
             labels=(torch.rand(n * batch, classes) < .1).float(), keys=[("film", k) for k in range(batch)])
    name, t = f"SlowFast-{'toy' if tiny else 'R50-4x16'} {h}x{w}, {n} people", at.Trainer(m, at.Recipe())

    def learn():
        with half():
            t.step([b])
    yield name, f"training, clips, batch {batch}", lambda s: clock(learn, batch, s)
    m.eval()
    on = slow.to(DEV), fast.to(DEV), [torch.as_tensor(boxes, device=DEV)] * batch
    yield name, f"inference, clips, batch {batch}", lambda s: clock(looker(lambda: m(*on, sizes=b["sizes"])), batch, s)


PARTS = dict(detr=detr, dfine=dfine, motrv2=motr, slowfast=slowfast)
STAGE = dict(detr="03", dfine="04", motrv2="05", slowfast="06")


def why(e):
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:160]}"


def measure(part, tiny, seconds):
    "Rows of a part; what cannot be measured says why."
    rows = PARTS[part](tiny)
    while True:
        try:
            name, what, run = next(rows)
        except StopIteration:
            return
        except Exception as e:
            yield dict(stage=STAGE[part], network=part, what="the whole part", left_out=why(e))
            return
        row = dict(stage=STAGE[part], network=name, what=what)
        try:
            if left() < 20:
                raise TimeoutError("ten minutes are over")
            rate, peak, n = run(seconds)
            row |= dict(a_second=round(rate, 3), peak_gb=peak and round(peak / 1e9, 2), steps=n,
                        fits_20_gb=None if peak is None else peak < CARD)
        except Exception as e:
            row["left_out"] = why(e)
        if GPU:
            torch.cuda.empty_cache()
        yield row


def main(argv=None):
    ap = argparse.ArgumentParser()
    ap.add_argument("--tiny", action="store_true")
    ap.add_argument("--parts", default=",".join(PARTS))
    ap.add_argument("--to", default="")
    a = ap.parse_args(argv)
    tiny = a.tiny or not GPU
    import transformers
    out = dict(machine=torch.cuda.get_device_name() if GPU else f"no GPU, {os.cpu_count()} cores", tiny=tiny,
               date=datetime.date.today().isoformat(), torch=torch.__version__, transformers=transformers.__version__,
               precision="bf16 where not said otherwise" if GPU else "fp32",
               command=" ".join(["python3 bench/gpu.py", *(sys.argv[1:] if argv is None else argv)]), rows=[])
    for part in a.parts.split(","):
        for row in measure(part, tiny, .1 if tiny else 6):
            out["rows"].append(row)
            print(json.dumps(row), flush=True)
    out["seconds"] = round(time.perf_counter() - T0, 1)
    to = Path(a.to) if a.to else None if tiny else TOP / "bench" / "results" / "gpu.json"
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(out, indent=1) + "\n")
    print(f"{len(out['rows'])} rows, {out['seconds']} s" + (f", in {to}" if to else ""))
    return out


if __name__ == "__main__":
    main()
