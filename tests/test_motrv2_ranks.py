"""Stage 05 on two processes: one launch shows that they tune as one, that the
first alone writes, and that what is left when one is killed goes on."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_detr_ranks import children

from crowdlens import motrv2_embed as stage
from crowdlens.core import runs
from crowdlens.core.det_db import read_det_db
from crowdlens.core.track_data import find_sequences
from crowdlens.models.motrv2 import SMALL, MOTRv2
from crowdlens.models.motrv2_training import Tuner
from crowdlens.models.track_steps import Clips

CFG = dict(data="world", detector="dfine", teacher="truth", calibration="none", train_sequences=1, test_sequences=1,
           frames=12, sampler_lengths=3, sample_interval=1, clip_limit=4, epochs=20, save_every=1, films=0,
           name="ranks", threads=1)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "What two processes left, the second of which was killed after some steps."
    out = tmp_path_factory.mktemp("ranks")
    yaml = out / "two.yaml"
    yaml.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in CFG.items()))
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    cmd = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
           f"--master_port={port}", "-m", "crowdlens.motrv2_embed", "-f", str(yaml), "--name", "ranks", "--out", str(out)]
    p = subprocess.Popen(cmd, stdout=open(out / "log", "w"), stderr=subprocess.STDOUT,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder, t0 = out / stage.STAGE / "ranks", time.time()
    state = folder / "tuning/tuned.pt"
    while p.poll() is None and time.time() - t0 < 600:
        if state.exists() and torch.load(state, weights_only=True)["clips"] >= 5:
            os.kill([pid for pid, env in children(p.pid) if b"RANK=1" in env][0], signal.SIGKILL)
            break
        time.sleep(.02)
    try:
        code = p.wait(120)
    finally:
        p.kill()
    return folder, code, (out / "log").read_text(), torch.load(state, weights_only=True)


def test_a_killed_rank_ends_the_run_with_an_error(killed):
    folder, code, log, _ = killed
    assert code != 0 and ("SIGKILL" in log or "exitcode  : -9" in log), log[-3000:]
    assert not (folder / "result.json").exists()


def test_two_processes_tune_as_one(killed):
    "Loss, gradients as the optimiser remembers them, and the vector."
    folder, _, log, kept = killed
    seq = find_sequences(folder.parents[1] / f".cache/world/tracks-{CFG['frames']}/court00000",
                         folder.parents[1] / f".cache/world/tracks-{CFG['frames']}")
    truth = {s.name: folder / "truth" / f"{s.name}.txt" for s in seq}
    if small := runs.shipped("tracker"):
        m = stage.load(small)
    else:
        torch.manual_seed(0)
        m = MOTRv2(SMALL).eval()
    clips = Clips(seq, read_det_db(folder / "det_db/main_train.json"), truth, CFG["clip_limit"], seed=0, length=3,
                  interval=1, change=False, scale=m.design.short_side / 800)
    me, losses = Tuner(m, 3e-3, accumulate=2), []
    for k in range(2 * kept["clips"]):
        epoch, i = divmod(k, len(clips))
        c = clips.clip(epoch, i)
        losses.append((me.learn(c), sum(map(len, c.ids))))
    assert kept["world"] == 2
    mine = me.opt.state_dict()["state"][0]["exp_avg"]
    theirs = kept["opt"]["state"][0]["exp_avg"]
    assert float((mine - theirs).abs().max() / mine.abs().max()) < 1e-4
    assert float((m.yolox_embed.weight.detach() - kept["vector"]).abs().max()) < 1e-5
    told = json.loads((folder / "tuning/tuned.json").read_text())
    pairs = list(zip(losses[::2], losses[1::2]))[:len(told)]
    assert len(pairs) >= 2, log[-2000:]
    for got, ((a, n), (b, k)) in zip(told, pairs):
        assert got == pytest.approx((a * n + b * k) / (n + k), rel=1e-4)


def test_only_the_first_writes(killed):
    folder, _, log, kept = killed
    rows = (folder / "log.txt").read_text().splitlines()
    assert sum("starts in" in r for r in rows) == 1 and sum("to learn from" in r for r in rows) == 1


def test_one_process_goes_on(killed):
    folder, _, _, kept = killed
    res = stage.run(stage.Config(**CFG, out=str(folder.parents[1])))
    done = torch.load(folder / "tuning/tuned.pt", weights_only=True)
    assert done["clips"] == CFG["epochs"] * CFG["clip_limit"] and done["world"] == 1
    assert res.metrics["tuned/norm"] > 0 and (folder / "checkpoints/last").exists()
