"""Stage 04's training: kills, processes, data that is odd."""
import json
import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from crowdlens import dfine_fisheye as stage
from crowdlens.core.detection_data import from_coco
from crowdlens.core.files import InputError, write_json
from crowdlens.core.frames import write_picture
from crowdlens.core.letterbox import Letterbox
from crowdlens.models import dfine_loop as loop
from crowdlens.models import dfine_training as dt
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


def _go(cfg, env):
    "What a child does; one thread, for bits depend on their number."
    os.environ.update(env)
    torch.set_num_threads(1)
    for s in (AcceleratorState, PartialState, GradientState):
        s._reset_state()
    try:
        stage.run(cfg)
    except BaseException as e:
        print(repr(e), flush=True)
        os._exit(3)
    os._exit(0)


def child(cfg, env=None):
    "A process that runs the stage and leaves at once; forked where no thread can hold a lock."
    p = clean.Process(target=_go, args=(cfg, dict(env or {})))
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


def test_two_processes_share_the_pictures(tmp_path):
    path = coco(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    cfg = config(path, name="two", out=str(tmp_path), epochs=1, stop_epoch=1, device_batch=1, val_limit=3)
    crew = [child(cfg, dict(env, RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]
    for p in crew:
        p.join(300)
    assert [p.exitcode for p in crew] == [0, 0]
    top = tmp_path / stage.STAGE / "two"
    rows = json.loads((top / "results.json").read_text())
    assert len({r["image_id"] for r in rows}) == 3
    per = [sum(r["image_id"] == i for r in rows) for i in {r["image_id"] for r in rows}]
    assert len(set(per)) == 1  # each picture once
    assert (top / "report.html").exists() and (top / "checkpoints" / "best").exists()


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


def test_the_pipeline_is_one_command(tmp_path):
    path = coco(tmp_path)
    cfg = config(path, name="all", out=str(tmp_path), mode="pipeline", unlabelled=str(tmp_path / "set"), epochs=1,
                 stop_epoch=0, copies=1, second_epochs=1, onnx=False, skip_thr=0.0, pseudo_thr=0.001)
    res = stage.run(cfg)
    top = tmp_path / stage.STAGE
    assert {"all", "all.first", "all.second"} <= {p.name for p in top.iterdir()}
    doc = json.loads((top / "all" / "merged.json").read_text())
    assert {a["provenance"] for a in doc["annotations"]} == {"people", "models"}
    assert "map_first" in res.metrics and (res.folder / "report.html").exists()


def test_batches_cover_an_epoch():
    for n, size, part, world in ((10, 4, 2, 1), (10, 4, 2, 2), (3, 8, 2, 1), (1, 4, 4, 1), (7, 4, 1, 4)):
        got = [k for r in range(world) for b in dt.batches(n, 3, 0, size, part, r, world) for k in b]
        assert len(set(got)) == min(len(got), n) and all(e == 3 for e, _ in got) and len(got) >= part * world


def test_data_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such data"):
        stage.run(config(tmp_path / "none.json", name="x", out=str(tmp_path)))
    with pytest.raises(InputError, match="without labels"):
        stage.run(config(coco(tmp_path), name="y", out=str(tmp_path), mode="pipeline"))
    with pytest.raises(InputError, match="looked at"):
        stage.run(config("world", name="z", out=str(tmp_path), mode="predict"))
    with pytest.raises(InputError, match="no multiple of device_batch"):
        config("world", batch_size=3)
