"Stage 06 on the world: killed and resumed, judged alone, on a film with tracks."
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crowdlens import slowfast_finetune as stage
from crowdlens.core.ava import read_ava
from crowdlens.core.files import InputError
from crowdlens.core.mot import mot_rows, save_mot
from crowdlens.core.world import World

SMALL = dict(data="world", arch="tiny", short=96, world_movies=2, world_seconds=5, max_iter=3, clips=2, batch=1,
             scale=False, ia="dense", warmup=0, lr=1e-2, save_every=1, skip_val=True)

KILLED = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from crowdlens import slowfast_finetune as stage
from crowdlens.models.action_training import Trainer
step = Trainer.step
def until(self, batches):
    if self.iteration == 2: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches)
Trainer.step = until
stage.run(stage.Config(**json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A whole run and one that was killed in its third step and resumed."
    out = str(tmp_path_factory.mktemp("stage"))
    torch.set_num_threads(1)
    whole = stage.run(stage.Config(**SMALL, out=out, name="whole"))
    broken = SMALL | dict(out=out, name="broken")
    got = subprocess.run([sys.executable, "-c", KILLED, json.dumps(broken)], capture_output=True, text=True)
    assert got.returncode == -9, got.stderr
    return whole, stage.run(stage.Config(**broken))


def test_killed_and_resumed_ends_bit_equal(runs):
    "Weights, optimiser, schedule, random states and memory pool; and figures."
    a, b = (r.folder / "checkpoints/last" for r in runs)
    x, y = (load_file(p / "model.safetensors") for p in (a, b))
    assert all(torch.equal(x[k], y[k]) for k in x) and set(x) == set(y)
    s, t = (torch.load(p / "state.pt", weights_only=True) for p in (a, b))
    assert s["pool"]["movies"] == t["pool"]["movies"] and len(s["pool"]["movies"])

    def same(p, q):
        if torch.is_tensor(p):
            return torch.equal(p, q)
        if isinstance(p, dict):
            return p.keys() == q.keys() and all(same(p[k], q[k]) for k in p)
        if isinstance(p, (list, tuple)):
            return len(p) == len(q) and all(map(same, p, q))
        return p == q
    assert same(s, t)
    assert runs[0].metrics == runs[1].metrics
    assert (runs[0].folder / "result.csv").read_bytes() == (runs[1].folder / "result.csv").read_bytes()


def test_a_finished_run_keeps_its_head(runs):
    "The start command again gives the result and trains nothing."
    out = str(runs[0].folder.parents[1])
    before = (runs[0].folder / "checkpoints/last/model.safetensors").stat().st_mtime_ns
    again = stage.run(stage.Config(**SMALL, out=out, name="whole"))
    assert again.metrics == runs[0].metrics
    assert (again.folder / "checkpoints/last/model.safetensors").stat().st_mtime_ns == before


def test_evaluation_alone_gives_the_same(runs):
    out, w = str(runs[0].folder.parents[1]), str(runs[0].folder / "checkpoints/last")
    got = stage.run(stage.Config(**SMALL | dict(mode="evaluate", weights=w), out=out, name="judge"))
    assert got.metrics["map_50"] == pytest.approx(runs[0].metrics["map_50"], abs=1e-9)
    with pytest.raises(InputError, match="no_head"):
        stage.network(stage.Config(**SMALL | dict(weights=w)), (stage.group_of("all", 2, False),), ["a", "b"])


def test_a_film_with_tracks(runs, tmp_path):
    "Tracks become people, and their numbers stay with what they do."
    out, w = str(runs[0].folder.parents[1]), str(runs[0].folder / "checkpoints/last")
    world = World("court", 20_003, 4, (160, 96))
    rows, film = [], tmp_path / "match.mp4"
    from crowdlens.core.frames import write_film

    def images():
        for im, t in world.frames(100):
            b = t.boxes_xyxy.copy()
            b[:, 2:] -= b[:, :2]
            rows.extend((t.index, i, x) for i, x in zip(t.ids, b) if min(x[2:]) > 2)
            yield im
    write_film(film, images())
    save_mot(tmp_path / "match.txt", mot_rows([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], .9))
    got = stage.run(stage.Config(mode="predict", data=str(film), boxes=str(tmp_path / "match.txt"), weights=w,
                                 out=out, name="film"))
    assert got.metrics["seconds"] == 4 and got.metrics["people"] > 4
    res = read_ava(got.folder / "result.csv", scored=True)
    assert set(res.action) == {1, 2, 3, 4, 5} and np.isfinite(res.score).all()
    assert (got.folder / "who_does_what.csv").read_text().startswith("movie,second,track,action,score\n")
    cfg = stage.Config(mode="predict", data=str(film), boxes=str(tmp_path / "match.txt"), weights=w)
    seen = list(stage.predict(cfg, stage.load_folder(w), film, cfg.boxes, [1, 2, 3, 4, 5]))
    at = {1: set(), 2: set(), 3: set()}  # seconds; their frames are 26, 51, 76
    for f, i, _ in rows:
        if f % 25 == 1 and f > 1:
            at[f // 25].add(int(i))
    assert [set(s.ids.tolist()) for s in seen if s.frame.second] == list(at.values())
