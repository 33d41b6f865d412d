"""Trains the toy detector of stage 03 several times in children of one
process: whole, and killed at a step and started again. Prints one JSON line:
what each left."""
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from crowdlens import detr_dinov3 as stage
from crowdlens.core.runs import history
from crowdlens.models import detr_training as dt

TINY = dict(
    data="world", train_limit=8, val_limit=4, backbone="tiny", d_model=32, num_queries=12, encoder_layers=1,
    decoder_layers=2, height=96, width=160, fallback_height=64, fallback_width=96, epochs=3, batch_size=2,
    device_batch=1, workers=0, report_to="none", affine=0.8, light=0.1, learning_rate=1e-3, precision="fp32",
)


def config(out, name, **kw):
    return stage.Config(**{**TINY, "out": str(out), "name": name, **kw})


def train(out, name, kill, kw):
    "Run in this process; dies before optimiser step `kill`."
    if kill is not None:
        step = dt.DetTrainer.training_step

        def dying(self, *a, **k):
            if self.state.global_step >= kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *a, **k)

        dt.DetTrainer.training_step = dying
    stage.run(config(out, name, **kw))


def child(*args):
    "Exit code of `train` in a child."
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        try:
            train(*args)
        except BaseException as e:
            print(type(e).__name__, e, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digest(x):
    "Hash of tensors and plain values, nested."
    h = hashlib.sha256()

    def walk(x):
        if isinstance(x, torch.Tensor):
            h.update(x.contiguous().numpy().tobytes())
        elif isinstance(x, dict):
            for k in sorted(x, key=str):
                h.update(str(k).encode())
                walk(x[k])
        elif isinstance(x, (list, tuple)):
            [walk(v) for v in x]
        else:
            h.update(repr(x).encode())

    walk(x)
    return h.hexdigest()[:16]


def left(out, name):
    "What a run left, timings apart."
    top = Path(out) / stage.STAGE / name
    last = top / "checkpoints" / "last"
    state = torch.load(last / "state.pt", weights_only=True)
    rows = [{k: v for k, v in r.items() if "second" not in k} for r in history(top)]
    figs = json.loads((top / "metrics.json").read_text())
    return dict(
        weights=hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()[:16],
        optimiser=digest(state["optimizer"]),
        schedule=digest(state["scheduler"]),
        torch_rng=digest(state["rng"]["torch"]),
        history=digest(rows),
        metrics={k: v for k, v in figs.items() if "second" not in k},
        step=last.resolve().name,
    )


if __name__ == "__main__":
    out, thaw = sys.argv[1], dict(unfreeze_backbone_at_epoch=1)
    got = {}
    for name, kill, kw in [("whole", None, {}), ("mid", 6, {}), ("thaw", None, thaw), ("before", 2, thaw), ("after", 6, thaw)]:
        codes = [child(out, name, kill, kw)]
        if kill is not None:
            codes.append(child(out, name, None, kw))
        got[name] = dict(codes=codes, **(left(out, name) if codes[-1] == 0 else {}))
    print(json.dumps(got))
