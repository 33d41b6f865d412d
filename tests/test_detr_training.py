"""Stage 03 killed and started again, and the places where a Trainer loses
something without a word."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def runs_of_toy(tmp_path_factory):
    "What each run of tests/detr_toy.py left."
    out = tmp_path_factory.mktemp("toy")
    env = os.environ | {"OMP_NUM_THREADS": "1", "CROWDLENS_OUT": str(out)}
    got = subprocess.run([sys.executable, str(HERE / "detr_toy.py"), str(out)], env=env, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-3000:]
    return json.loads(got.stdout.splitlines()[-1]), out


def equal(a, b):
    "Both without their exit codes."
    strip = lambda r: {k: v for k, v in r.items() if k != "codes"}
    assert "weights" in a and strip(a) == strip(b)


def test_killed_in_mid_epoch(runs_of_toy):
    got, _ = runs_of_toy
    assert got["mid"]["codes"] == [-9, 0]
    equal(got["whole"], got["mid"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_on_either_side_of_the_thaw(runs_of_toy, when):
    got, _ = runs_of_toy
    assert got[when]["codes"] == [-9, 0]
    equal(got["thaw"], got[when])
    assert got["thaw"]["weights"] != got["whole"]["weights"]


def test_frozen_is_bit_equal_and_thawed_moves(runs_of_toy):
    from safetensors.torch import load_file

    from crowdlens.models.detr import build

    _, out = runs_of_toy
    start = build("tiny", ["person", "head"], 12, 1, 2, d_model=32, encoder_ffn_dim=256, decoder_ffn_dim=256).state_dict()

    def moved(run, epoch):
        got = load_file(out / "03_detr_dinov3" / run / "checkpoints" / epoch / "model.safetensors")
        return {k for k in got if ".backbone." in k and not torch.equal(got[k], start[k])}

    assert not moved("whole", "last")
    assert not moved("thaw", "epoch-0001")
    after = moved("thaw", "last")
    assert len(after) > 10 and not any("mask_token" in k for k in after)
