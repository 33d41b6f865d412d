"""Stage 03 on two processes: one launch shows that they train as one, before
and after the backbone thaws, look at each image once, and leave a folder that
goes on when one of them is killed."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

CFG = dict(
    data="world", train_limit=8, val_limit=3, d_model=32, num_queries=40, encoder_layers=1, decoder_layers=2,
    height=96, width=160, epochs=4, batch_size=4, workers=0, report_to="none", flip=0.0, affine=0.0, log_every=1,
    learning_rate=1e-3, precision="fp32", name="ranks", unfreeze_backbone_at_epoch=1,
)


def rows(folder):
    return [json.loads(l) for l in (folder / "history.jsonl").read_text().splitlines()]


def children(pid):
    "Processes started by `pid`, with their environment."
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if int((p / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                yield int(p.name), (p / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "The run of one process, and the folder that two left when one was killed in the third epoch."
    from crowdlens import detr_dinov3 as stage
    from crowdlens.core.report import Report
    from crowdlens.models import checkpoints, detector
    from crowdlens.models.detr import build

    out = tmp_path_factory.mktemp("ranks")
    m = build("tiny", ["person", "head"], 40, 1, 2, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0,
              activation_dropout=0.0, attention_dropout=0.0)
    from crowdlens.core.letterbox import Letterbox

    detector.save_hugging_face(checkpoints._wrap(m, dict(geometry=Letterbox(96, 160)), "start"), out / "start")
    cfg = CFG | dict(checkpoint_path=str(out / "start"))
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(stage, "report", lambda *a, **k: (Report("none"), None))
        one = stage.run(stage.Config(**cfg, device_batch=4, out=str(out / "one")))
    yaml = out / "two.yaml"
    yaml.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in (cfg | dict(device_batch=2)).items()))
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    cmd = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
           f"--master_port={port}", "-m", "crowdlens.detr_dinov3", "-f", str(yaml), "--name", "ranks", "--out", str(out / "two")]
    log = open(out / "log", "w")
    p = subprocess.Popen(cmd, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder, t0 = out / "two" / stage.STAGE / "ranks", time.time()
    while p.poll() is None and time.time() - t0 < 900:
        if (folder / "checkpoints" / "epoch-0002").exists():
            rank1 = [pid for pid, env in children(p.pid) if b"RANK=1" in env]
            os.kill(rank1[0], signal.SIGKILL)
            break
        time.sleep(0.05)
    try:
        code = p.wait(120)
    finally:
        p.kill()
    return one, folder, code, (out / "log").read_text(), cfg, out


def test_a_killed_rank_ends_the_run_with_an_error(both):
    one, folder, code, log, *_ = both
    assert code != 0 and "SIGKILL" in log or "exitcode  : -9" in log, log[-3000:]
    assert not (folder / "metrics.json").exists()
    assert (folder / "checkpoints" / "last").resolve().name in ("epoch-0002", "epoch-0003")


def test_loss_and_gradient_are_those_of_one_process(both):
    "Two steps an epoch; from the third on the backbone learns, with the gradients of both."
    one, folder, _, log, *_ = both
    a = {r["step"]: r for r in rows(one.folder) if "grad_norm" in r}
    b = {r["step"]: r for r in rows(folder) if "grad_norm" in r}
    assert {1, 2, 3, 4} <= set(b), log[-3000:]
    for k in (1, 2, 3, 4):
        for what in ("loss", "loss_ce", "loss_bbox", "loss_giou", "grad_norm"):
            assert b[k][what] == pytest.approx(a[k][what], rel=1e-4), (k, what)


def test_each_image_is_looked_at_once(both):
    "Three images on two processes: one comes twice and counts once."
    one, folder, *_ = both
    a, b = ([r for r in rows(f) if "eval_images" in r] for f in (one.folder, folder))
    assert [r["eval_images"] for r in b[:2]] == [3, 3] and len(b) >= 2
    for x, y in zip(a, b):
        for k in x:
            if k.startswith("eval_") and x[k] is not None and "second" not in k and k != "eval_loss":
                assert y[k] == pytest.approx(x[k], abs=1e-4), k


def test_the_folder_goes_on(both):
    from safetensors.torch import load_file

    from crowdlens import detr_dinov3 as stage
    from crowdlens.core.report import Report

    one, folder, _, _, cfg, out = both
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(stage, "report", lambda *a, **k: (Report("none"), None))
        r = stage.run(stage.Config(**cfg, device_batch=4, out=str(out / "two")))
    a, b = (load_file(f / "checkpoints" / "last" / "model.safetensors") for f in (one.folder, r.folder))
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3
    assert len(json.loads((r.folder / "results.json").read_text())) == 3 * 40
