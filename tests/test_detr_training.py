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


def toy_config(tmp_path, **kw):
    from crowdlens import detr_dinov3 as stage

    base = dict(
        data="world", train_limit=4, val_limit=2, backbone="tiny", d_model=32, num_queries=12, encoder_layers=1,
        decoder_layers=2, height=96, width=160, epochs=1, batch_size=2, device_batch=1, workers=0, report_to="none",
        out=str(tmp_path), name="t", precision="fp32",
    )
    return stage.Config(**{**base, **kw})


def trained(cfg):
    from crowdlens import detr_dinov3 as stage

    return stage.run(cfg)


def test_a_loss_that_is_no_number_stops_and_keeps_the_batch(tmp_path, monkeypatch):
    from crowdlens.core.files import InputError
    from crowdlens.models import detr

    bad = lambda *a, **k: (torch.full((), float("nan"), requires_grad=True), {}, None)
    monkeypatch.setattr(detr, "detr_loss", bad)
    monkeypatch.setattr("crowdlens.detr_dinov3.probe", lambda *a: dict(height=96, width=160, seconds_a_batch=1, peak_gb=None))
    with pytest.raises(InputError, match="the loss is nan in step 1"):
        trained(toy_config(tmp_path))
    kept = torch.load(tmp_path / "03_detr_dinov3" / "t" / "bad_batch_0.pt", weights_only=False)
    assert kept["step"] == 0 and "boxes_cxcywh_rel" in kept["batch"]


def test_memory_falls_back_to_the_smaller_canvas(tmp_path, monkeypatch):
    from crowdlens import detr_dinov3 as stage

    real = stage.try_step

    def small_only(model, batch, *a):
        if batch["image"].shape[1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(model, batch, *a)

    monkeypatch.setattr(stage, "try_step", small_only)
    r = trained(toy_config(tmp_path, fallback_height=64, fallback_width=100))
    assert "(96, 160) does not fit" in (r.folder / "log.txt").read_text()
    info = json.loads((r.folder / "checkpoints" / "best" / "crowdlens.json").read_text())
    assert (info["geometry"]["height"], info["geometry"]["width"]) == (64, 100)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(toy_config(tmp_path_factory.mktemp("finished")))


def test_best_and_last_are_whole_in_every_reader(finished):
    "Ours, transformers' from_pretrained and its pipeline find every weight."
    from safetensors.torch import load_file
    from transformers import DetrForObjectDetection

    from crowdlens.models import checkpoints

    top = finished.folder / "checkpoints" / "best"
    want = load_file(top / "model.safetensors")
    ours = checkpoints.open(top).model.state_dict()
    theirs = DetrForObjectDetection.from_pretrained(top).state_dict()
    for got in (ours, theirs):
        assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(finished, tmp_path, damage):
    import shutil

    from crowdlens.core.files import InputError
    from crowdlens.models import checkpoints

    here = tmp_path / "ck"
    shutil.copytree(finished.folder / "checkpoints" / "best", here)
    f = here / "model.safetensors"
    if damage == "gone":
        f.unlink()
    else:
        f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    with pytest.raises(InputError):
        checkpoints.open(here)


GUIDE = """train:
  checkpoint_path: {ck}
  freeze_backbone: {freeze}
  unfreeze_backbone_at_epoch: {thaw}
  epochs: {epochs}
  learning_rate: {lr}
"""


@pytest.mark.parametrize(
    "freeze,thaw,epochs,lr,phases",
    [
        ("true", -1, 20, "0.0001", [(0, 20, True)]),
        ("false", -1, 20, "0.00005  # lower", [(0, 20, False)]),
        ("true", 10, 20, "0.0001", [(0, 10, True), (10, 20, False)]),
        ("true", -1, 20, "1e-4", [(0, 20, True)]),
    ],
)
def test_the_guides_examples(tmp_path, freeze, thaw, epochs, lr, phases):
    from crowdlens import detr_dinov3 as stage
    from crowdlens.models import detr_training as dt

    f = tmp_path / "default.yaml"
    ck = "lightning_logs/version_0/checkpoints/best_epoch=6-step=51751-train_loss=2.9145.ckpt"
    f.write_text(GUIDE.format(ck=f'"{ck}"', freeze=freeze, thaw=thaw, epochs=epochs, lr=lr))
    cfg = stage.Config(data="world", **stage.from_guide(f))
    assert cfg.checkpoint_path == ck and cfg.learning_rate == float(lr.split()[0])
    assert dt.phases(cfg.epochs, cfg.freeze_backbone, cfg.unfreeze_backbone_at_epoch) == phases


def test_fine_tuning_a_lightning_file(finished, tmp_path):
    from safetensors.torch import load_file

    sd = load_file(finished.folder / "checkpoints" / "best" / "model.safetensors")
    ck = tmp_path / "best_epoch=6-step=51751-train_loss=2.9145.ckpt"
    torch.save({"epoch": 6, "global_step": 9, "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.{k}": v for k, v in sd.items()}, "hyper_parameters": {}}, ck)
    r = trained(toy_config(tmp_path, checkpoint_path=str(ck), heads="remake", learning_rate=1e-9))
    got = load_file(r.folder / "checkpoints" / "last" / "model.safetensors")
    far = max((got[k] - sd[k]).abs().max().item() for k in sd if sd[k].shape == got[k].shape)
    assert far < 1e-4


def test_no_objects_at_all_and_more_than_queries(tmp_path):
    import shutil

    import numpy as np

    from crowdlens import detr_dinov3 as stage

    cfg = toy_config(tmp_path)
    stage.load(cfg)
    src = next((tmp_path / ".cache" / "world").iterdir())
    empty = tmp_path / "empty"
    shutil.copytree(src, empty)
    for f in empty.glob("*/labels/*.txt"):
        f.write_text("")
    r = trained(toy_config(tmp_path, data=str(empty), name="none"))
    assert r["map"] is None and np.isfinite(r["loss"])
    assert "no image has an object" in (r.folder / "log.txt").read_text()
    few = trained(toy_config(tmp_path, num_queries=3, name="few"))
    assert "cannot be learnt or found" in (few.folder / "log.txt").read_text()


def test_the_pilot_on_real_pictures(shared, tmp_path, trackio_dir):
    "The profile `pilot` on people and heads: checkpoint, figures, report, dashboard, and what the full run takes."
    from crowdlens import detr_dinov3 as stage
    from crowdlens.core import runs
    from crowdlens.models import checkpoints

    pairs = ("backbone=tiny", "height=128", "width=208", "d_model=32", "encoder_layers=1", "decoder_layers=2", "workers=0",
             "train_limit=4", "epoch_limit=0.0001", f"data={shared / 'realdata' / 'person_head_coco'}")
    cfg = stage.Config(**runs.settings(stage.STAGE, stage.Config, "pilot", pairs, out=str(tmp_path)))
    assert (cfg.epochs, cfg.num_queries, cfg.report_to) == (1, 300, "trackio")
    r = stage.run(cfg)
    got = {p.name for p in r.folder.iterdir()}
    assert {"metrics.json", "report.html", "config.json", "results.json", "log.txt", "worst"} <= got
    checkpoints.open(r.folder / "checkpoints" / "best")
    assert {"map", "map/person", "map/head", "mar_500", "mr2", "ji"} <= set(json.loads((r.folder / "metrics.json").read_text()))
    log = (r.folder / "log.txt").read_text()
    assert "this run will take: images 4, epochs 1, steps 2" in log
    assert "all images will take: images 6, epochs 10, steps 10" in log and "objects beyond 300 queries 0" in log
    page = (r.folder / "report.html").read_text()
    for words in ("images a second, training", "minutes an epoch", "peak memory", "disk for checkpoints", "all images", "An epoch of 6 images",
                  "crowdlens submit"):
        assert words in page
    assert list(trackio_dir.glob("crowdlens*.db"))
