"""Stage 04's training: kills, processes, data that is odd."""
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import types

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from crowdlens import dfine_fisheye as stage
from crowdlens.core import fisheye_challenge as challenge
from crowdlens.core.coco import LabelMap, read_coco
from crowdlens.core.detection_data import from_coco
from crowdlens.core.files import InputError, write_json
from crowdlens.core.frames import write_picture
from crowdlens.core.letterbox import Letterbox
from crowdlens.core.runs import history
from crowdlens.models import checkpoints
from crowdlens.models import dfine_loop as loop
from crowdlens.models import dfine_training as dt
from crowdlens.models.detector import save_hugging_face
from crowdlens.models.small_detector import MEAN, STD, small_detector

clean = multiprocessing.get_context("forkserver")
clean.set_forkserver_preload(["crowdlens.dfine_fisheye"])


def coco(top, n=6, names=("Bus", "Car"), size=(96, 96), seed=0):
    "Pictures of coloured rectangles and their JSON."
    rng = np.random.default_rng(seed)
    doc = dict(images=[], annotations=[], categories=[dict(id=i, name=c) for i, c in enumerate(names)])
    for i in range(1, n + 1):
        pic = np.full((size[1], size[0], 3), 90, np.uint8)
        for _ in range(2):
            (x, y), (w, h), c = rng.integers(0, 50, 2), rng.integers(15, 40, 2), int(rng.integers(2))
            pic[y:y + h, x:x + w] = (220, 40, 40) if c else (40, 40, 220)
            doc["annotations"].append(dict(id=len(doc["annotations"]) + 1, image_id=i, category_id=c, iscrowd=0,
                                           bbox=[int(x), int(y), int(w), int(h)], area=int(w * h)))
        name = f"camera1_A_{i}.png"
        write_picture(top / "set" / name, pic)
        doc["images"].append(dict(id=i, file_name=name, width=size[0], height=size[1]))
    write_json(top / "set.json", doc)
    return top / "set.json"


def config(path, **kw):
    return stage.Config(**dict(dict(
        data=str(path), val_limit=4, model="tiny", size=128, epochs=4, stop_epoch=2, batch_size=2, device_batch=2,
        lr=1e-3, backbone_lr=1e-3, warmup_steps=2, scales=1, workers=0, ema_ramp=20, clip=1.), **kw))


def _go(cfgs, env):
    "What a child does, one run after the other; one thread, for bits depend on their number."
    os.environ.update(env)
    torch.set_num_threads(1)
    for s in (AcceleratorState, PartialState, GradientState):
        s._reset_state()
    try:
        for cfg in cfgs:
            stage.run(cfg)
    except BaseException as e:
        print(repr(e), flush=True)
        os._exit(3)
    os._exit(0)


def child(*cfgs, env=None):
    "A process that runs the stage and leaves at once; forked where no thread can hold a lock."
    p = clean.Process(target=_go, args=(cfgs, dict(env or {})))
    p.start()
    return p


def wait_for(what, seconds=240):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "waited too long"
        time.sleep(.02)


def state(folder):
    "What must be equal: averaged weights, optimiser, figures."
    top = folder / "checkpoints" / "last"
    s = torch.load(top / "state.pt", weights_only=True)
    figs = json.loads((folder / "metrics.json").read_text())
    return load_file(top / "model.safetensors"), s, figs


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def test_killed_in_mid_epoch_equals_not_killed(tmp_path):
    path = coco(tmp_path)
    assert child(config(path, name="whole", out=str(tmp_path))).join() is None
    top = tmp_path / stage.STAGE
    for at in ("epoch 1 of", "epoch 3 of"):  # in each of the two stages
        name = "cut" + at[6]
        p = child(config(path, name=name, out=str(tmp_path)))
        log = top / name / "log.txt"
        wait_for(lambda: log.exists() and at in log.read_text())
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        assert not (top / name / "metrics.json").exists()
        p = child(config(path, name=name, out=str(tmp_path)))
        p.join()
        assert p.exitcode == 0
        want, got = state(top / "whole"), state(top / name)
        assert same(got[0], want[0]) and got[2] == want[2]
        assert [k for k in want[1] if not same(got[1][k], want[1][k])] == []


def crew(*cfgs):
    "Two processes of one run, joined by gloo."
    with socket.socket() as so:
        so.bind(("127.0.0.1", 0))
        port = so.getsockname()[1]
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    return [child(*cfgs, env=dict(env, RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]


def test_two_processes_one_killed_and_each_picture_once(tmp_path):
    "An error instead of waiting for ever, a folder that goes on, and no picture twice though 3 and 7 are odd."
    path = coco(tmp_path, 7)
    cfg = config(path, name="two", out=str(tmp_path), epochs=2, stop_epoch=2, device_batch=1, val_limit=3)
    top = tmp_path / stage.STAGE / "two"
    a, b = crew(cfg)
    wait_for(lambda: (top / "checkpoints" / "last").exists())
    os.kill(b.pid, signal.SIGKILL)
    a.join(600)
    assert a.exitcode not in (0, None) and not (top / "metrics.json").exists()
    best = top / "checkpoints" / "best"
    judge = config(path, name="judge", out=str(tmp_path), mode="evaluate", model=str(best), val_limit=0)
    both = crew(cfg, judge)
    for p in both:
        p.join(600)
    assert [p.exitcode for p in both] == [0, 0]
    log = (top / "log.txt").read_text()
    assert log.count("epoch 1 of") == 1 and log.count("epoch 2 of") == 1
    rows = json.loads((top / "results.json").read_text())
    per = [sum(r["image_id"] == i for r in rows) for i in {r["image_id"] for r in rows}]
    assert len(per) == 3 and len(set(per)) == 1
    assert (top / "report.html").exists() and best.exists()
    parts = [f.read_text().splitlines() for f in (top.parent / "judge").glob("detections-*.jsonl")]
    assert sorted(map(len, parts)) == [3, 4] and len({json.loads(r)["image"] for p in parts for r in p}) == 7


def test_the_loss_that_is_no_number_names_the_pictures(tmp_path):
    data = from_coco(coco(tmp_path, 2), tmp_path / "set")
    net = small_detector(["Bus", "Car"], queries=20)
    me = loop.Learner(net, loop.Plan(batch_size=2, device_batch=2), 4, MEAN, STD)
    me.folder = tmp_path
    with torch.no_grad():
        net.model.decoder.pre_bbox_head.layers[2].bias.fill_(float("nan"))
    items = dt.Items(data, Letterbox(96, 96, 32, "stretch"))
    with pytest.raises(InputError, match="is nan") as e:
        me.learn([loop.collate([items[0], items[1]])])
    assert torch.load(e.value.path)["index"] == [[0, 1]]


def test_pictures_without_objects_and_other_classes(tmp_path):
    path = coco(tmp_path)
    doc = json.loads(path.read_text())
    write_json(path, dict(doc, annotations=doc["annotations"][:1]))
    res = stage.run(config(path, name="few", out=str(tmp_path), epochs=1, stop_epoch=0))
    assert np.isfinite(res["map"])
    one = res.folder / "checkpoints" / "best"
    other = tmp_path / "other"
    other.mkdir()
    path = coco(other, names=("Car", "Tram"))
    res = stage.run(config(path, name="other", out=str(tmp_path), model=str(one), size=0, epochs=1, stop_epoch=0))
    text = (res.folder / "log.txt").read_text()
    assert "classes that start fresh: Tram" in text
    bad = stage.run(config(path, name="judge", out=str(tmp_path), mode="evaluate", model=str(one)))
    assert bad["f1"] is not None and "map/Car" in bad.metrics


def awake(folder, names=("Bus", "Car")):
    "A small network whose weights give no ties, as a checkpoint."
    net, g = small_detector(list(names), 0).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p += .3 * p.std() * torch.randn(p.shape, generator=g)
    ck = checkpoints.Checkpoint(net, LabelMap.make(list(names)), Letterbox(128, 128, 32, "stretch"), MEAN, STD)
    save_hugging_face(ck, folder)
    return str(folder)


def test_the_pipeline_is_one_command(tmp_path, monkeypatch):
    "Stopped between two steps it goes on there; its last step is an ONNX file that equals the network."
    path = coco(tmp_path)
    cfg = config(path, name="all", out=str(tmp_path), mode="pipeline", unlabelled=str(tmp_path / "set"), epochs=1,
                 stop_epoch=0, copies=1, second_epochs=1, skip_thr=0.0, pseudo_thr=0.001, model=awake(tmp_path / "net"),
                 size=0, lr=1e-4, backbone_lr=1e-4)

    def stop(*a):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(stage, "fused_labels", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.run(cfg)
    top = tmp_path / stage.STAGE
    first = (top / "all.first" / "metrics.json").stat().st_mtime_ns
    assert not (top / "all" / "metrics.json").exists() and not (top / "all.second").exists()
    res = stage.run(cfg)
    assert (top / "all.first" / "metrics.json").stat().st_mtime_ns == first
    doc = json.loads((top / "all" / "merged.json").read_text())
    assert {a["provenance"] for a in doc["annotations"]} == {"people", "models"}
    assert all(0 <= a["score"] <= 1 for a in doc["annotations"])
    page = (res.folder / "report.html").read_text()
    for step in ("augment", "train", "label", "fuse", "merge", "train again", "evaluate", "export"):
        assert f">{step}</td>" in page, step
    info = json.loads((top / "all" / "export" / "model.json").read_text())
    assert max(info["difference"]["logits"], info["difference"]["boxes"]) <= 1e-4
    assert "map_first" in res.metrics and checkpoints.open(res.folder / "export" / "model.onnx").labels.names == ("Bus", "Car")


def test_real_fisheye_pictures_through_every_mode(shared, tmp_path):
    "FishEye8K: copies, two steps of training, detections, a submission, labels, figures."
    top = shared / "realdata" / "fisheye8k"
    common = dict(images=str(top / "images"), out=str(tmp_path), val_limit=0)
    truth = top / "coco.json"
    made = stage.run(config(truth, name="copies", mode="augment", copies=1, **common))
    assert made["images"] == 8 and made["skipped"] == 0 and made["annotations"] > 114
    new = made.folder / "augmented"
    one = stage.run(config(new / "annotations.json", name="two steps", epochs=1, stop_epoch=0, batch_size=4, device_batch=4,
                           val_data=str(truth), val_images=str(top / "images"), **common | dict(images=str(new / "images"))))
    assert [h["step"] for h in history(one.folder)] == [2] and np.isfinite(one["map"])
    best = str(one.folder / "checkpoints" / "best")
    write_json(tmp_path / "test.json", dict(allowed_classes=[0, 2], score_threshold=.0, sequence_name="fish/a"))
    names = [c["name"] for c in json.loads(truth.read_text())["categories"]]
    seen = stage.run(config(top / "images", name="seen", mode="predict", model=best, submission=True, out=str(tmp_path),
                            thresholds=dict.fromkeys(names, 0.), det_config=str(tmp_path / "test.json")))
    sub = json.loads((seen.folder / "submission.json").read_text())
    known = {challenge.image_id(f.name) for f in (top / "images").iterdir()}
    assert challenge.validate(sub, known)["images"] == 4
    db = json.loads((seen.folder / "det_db.json").read_text())
    rows = json.loads((seen.folder / "results.json").read_text())
    assert list(db)[0] == "fish/a/img1/00000001.txt"
    assert sum(map(len, db.values())) == sum(r["category_id"] in (0, 2) for r in rows)
    figs = stage.run(config(truth, name="judged", mode="evaluate", model=best, **common))
    assert figs["map"] == pytest.approx(one["map"], abs=2e-3) and "f1_challenge" in figs.metrics
    got = stage.run(config("", name="labels", mode="label", unlabelled=str(top / "images"), val_data=str(truth),
                           teachers=[str(seen.folder / "results.json"), best], skip_thr=0., pseudo_thr=.001,
                           out=str(tmp_path)))
    doc = read_coco(got.folder / "pseudo.json")
    agree = [a["models"] == ["teacher 1", "teacher 2"] for a in doc["annotations"]]  # the same network twice
    assert len(agree) == got["labels"] > 0 and np.mean(agree) > .9
    assert (got.folder / "thresholds.json").exists() and (got.folder / "report.html").exists()


def test_a_name_that_leaves_its_folder_is_not_merged(tmp_path):
    write_json(tmp_path / "in.json", dict(images=[dict(id=1, file_name="../../etc/passwd")]))
    with pytest.raises(InputError, match="leaves its folder"):
        stage.relative(tmp_path / "in.json", tmp_path / "pics", tmp_path)


def test_batches_cover_an_epoch():
    for n, size, part, world in ((10, 4, 2, 1), (10, 4, 2, 2), (3, 8, 2, 1), (1, 4, 4, 1), (7, 4, 1, 4)):
        got = [k for r in range(world) for b in dt.batches(n, 3, 0, size, part, r, world) for k in b]
        assert len(set(got)) == min(len(got), n) and all(e == 3 for e, _ in got) and len(got) >= part * world


def test_curves_for_tensorboard(tmp_path, monkeypatch):
    "Refused before a training, not after it, where the package is absent."
    class Writer:
        rows = []

        def __init__(self, where):
            self.where = where

        def __enter__(self):
            return self

        def __exit__(self, *a):
            pass

        def add_scalar(self, *a):
            self.rows.append((self.where, *a))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    (tmp_path / "history.jsonl").write_text('{"step": 3, "loss": 2.5, "eval_f1": null}\n{"step": 6, "loss": 1.5}\n')
    stage.to_tensorboard(tmp_path, tmp_path / "tb")
    assert Writer.rows == [(str(tmp_path / "tb"), "loss", 2.5, 3), (str(tmp_path / "tb"), "loss", 1.5, 6)]
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs tensorboard"):
        config("world", summary_dir="tb")


def test_data_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such data"):
        stage.run(config(tmp_path / "none.json", name="x", out=str(tmp_path)))
    with pytest.raises(InputError, match="without labels"):
        stage.run(config(coco(tmp_path), name="y", out=str(tmp_path), mode="pipeline"))
    with pytest.raises(InputError, match="looked at"):
        stage.run(config("world", name="z", out=str(tmp_path), mode="predict"))
    with pytest.raises(InputError, match="which pictures"):
        stage.run(config("", name="w", out=str(tmp_path), mode="label"))
    with pytest.raises(InputError, match="no multiple of device_batch"):
        config("world", batch_size=3)
