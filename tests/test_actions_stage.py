"Stage 06 on the world: killed and resumed, judged alone, on a film with tracks."
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import test_slowfast as toy
from crowdlens import slowfast_finetune as stage
from crowdlens.core.ava import ava_rows, read_ava, save_ava
from crowdlens.core.files import InputError
from crowdlens.core.frames import write_film
from crowdlens.core.mot import mot_rows, save_mot
from crowdlens.core.world import World
from crowdlens.models import action_training as training

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


def weights_of(result):
    return str(result.folder / "checkpoints/last")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Four seconds of a court and the tracks of its people."
    top = tmp_path_factory.mktemp("film")
    world, rows = World("court", 20_003, 4, (160, 96)), []

    def images():
        for im, t in world.frames(100):
            b = t.boxes_xyxy.copy()
            b[:, 2:] -= b[:, :2]
            rows.extend((t.index, i, x) for i, x in zip(t.ids, b) if min(x[2:]) > 2)
            yield im
    write_film(top / "films/match.mp4", images())
    save_mot(top / "match.txt", mot_rows([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], .5))
    return top, rows


def test_a_film_with_tracks(runs, film):
    "Tracks become people, and their numbers stay with what they do."
    out, w, (top, rows) = str(runs[0].folder.parents[1]), weights_of(runs[0]), film
    cfg = dict(mode="predict", data=str(top / "films/match.mp4"), boxes=str(top / "match.txt"), weights=w)
    got = stage.run(stage.Config(**cfg, out=out, name="film"))
    assert got.metrics["seconds"] == 4 and got.metrics["people"] > 4
    res = read_ava(got.folder / "result.csv", scored=True)
    assert set(res.action) == {1, 2, 3, 4, 5} and np.isfinite(res.score).all()
    assert (got.folder / "who_does_what.csv").read_text().startswith("movie,second,track,action,score\n")
    cfg = stage.Config(**cfg)
    seen = list(stage.predict(cfg, stage.load_folder(w), cfg.data, cfg.boxes, [1, 2, 3, 4, 5]))
    at = {1: set(), 2: set(), 3: set()}  # seconds; their frames are 26, 51, 76
    for f, i, _ in rows:
        if f % 25 == 1 and f > 1:
            at[f // 25].add(int(i))
    assert [set(s.ids.tolist()) for s in seen if s.frame.second] == list(at.values())


def test_films_become_a_set_that_can_be_judged(runs, film, tmp_path):
    "The guide's steps on a film of one's own: clips, key frames, a list, boxes, labels, figures."
    top, rows = film
    cfg = dict(mode="prepare", data=str(top / "films"), boxes=str(top / "match.txt"), train_split="val",
               to=str(tmp_path / "set"))
    got = stage.run(stage.Config(**cfg, name="cut"))
    assert got.metrics["key_frames"] == 4 and got.metrics["person_boxes"] > 4 and got.metrics["labelled"] == 0
    own = tmp_path / "set"
    assert {p.name for p in (own / "clips/match").iterdir()} == {"0.mp4", "1.mp4", "2.mp4", "3.mp4"}
    js = json.loads((own / "annotations/val.json").read_text())
    people = json.loads((own / "boxes/val_person_bbox.json").read_text())
    judge = dict(SMALL, mode="evaluate", data=str(own), weights=weights_of(runs[0]), missing="repeat", no_head=True)
    with pytest.raises(InputError, match="nobody here has an action"):
        stage.run(stage.Config(**judge, name="early"))
    # somebody labels, in the guide's dialect: a category is an action, a movie and second a file name
    js = dict(images=[dict(id=i["id"], file_name=f"{i['movie']}/{i['timestamp']}.jpg", width=i["width"],
                           height=i["height"]) for i in js["images"]],
              annotations=[dict(id=k, image_id=p["image_id"], category_id=1 + k % 2, bbox=p["bbox"], area=1, iscrowd=0)
                           for k, p in enumerate(people)],
              categories=[dict(id=1, name="stand"), dict(id=2, name="walk")])
    (own / "annotations/val.json").write_text(json.dumps(js))
    (own / "clips").rename(own / "films")  # clips/<split>/ does as well as clips/
    (own / "clips").mkdir()
    (own / "films").rename(own / "clips/val")
    got = stage.run(stage.Config(**judge | dict(groups=dict(posture=["stand", "walk"])), name="judged"))
    assert got.metrics["clips"] == 4 and 0 <= got.metrics["map_50"] <= 1
    check = json.loads((got.folder / "data_check.json").read_text())
    assert any("their category is taken as the action" in row["what"] for row in check)


def start(runs, **more):
    "A training beside those of the fixture, on the same world."
    out = str(runs[0].folder.parents[1])
    return stage.run(stage.Config(**SMALL | dict(ia="", save_every=2, max_iter=2, out=out) | more))


def test_flags_of_the_published_program(runs, tmp_path):
    "What transfer, no_head, adjust, skip_val and seed mean; a trained head is never thrown away."
    w = weights_of(runs[0])
    one = start(runs, name="one", ia="dense", weights=w, no_head=True, eval_every=1)
    history = [json.loads(l) for l in (one.folder / "history.jsonl").read_text().splitlines()]
    assert [r["step"] for r in history if "map_50" in r] == [2]  # skip_val: at the end alone
    head = "roi_heads.action.predictor.cls_score.weight"
    made = load_file(one.folder / "checkpoints/last/model.safetensors")
    seen, learn = {}, stage.learn

    def look(cfg, r, t, *rest):
        seen.update(at=t.iteration, head=t.model.state_dict()[head].clone(), lr=t.opt.param_groups[0]["lr"],
                    momentum=len(t.opt.state))
        return learn(cfg, r, t, *rest)
    stage.learn = look
    try:
        # the start command again, with more steps: goes on with the trained head
        again = dict(ia="dense", weights=w, no_head=True)
        start(runs, name="one", max_iter=3, eval_every=1, **again)
        assert seen["at"] == 2 and torch.equal(seen["head"], made[head])
        # another schedule is refused, or taken at the step that was reached
        with pytest.raises(InputError, match="adjust=true"):
            start(runs, name="one", max_iter=4, lr=1e-3, **again)
        start(runs, name="one", max_iter=4, lr=1e-3, adjust=True, **again)
        assert seen["at"] == 3 and seen["lr"] == pytest.approx(1e-3)
        # transfer: the weights alone, or all of a training
        start(runs, name="two", ia="dense", weights=w, max_iter=4)
        assert seen["at"] == 0 and seen["momentum"] == 0
        with pytest.raises(InputError, match="frozen_bn"):  # those weights did not learn there
            start(runs, name="other", ia="dense", weights=w, max_iter=4, transfer=False)
        start(runs, name="three", ia="dense", weights=w, max_iter=4, transfer=False, frozen_bn=False)
        assert seen["at"] == 3 and seen["momentum"] > 0
        with pytest.raises(InputError, match="transfer=true"):
            best = tmp_path / "weights"
            shutil.copytree(w, best, ignore=shutil.ignore_patterns("state.pt"))
            start(runs, name="four", ia="dense", weights=str(best), transfer=False, frozen_bn=False)
        # seed: other start values
        start(runs, name="five", seed=1)
        a = seen["head"]
        start(runs, name="six", seed=2)
        assert not torch.equal(a, seen["head"])
    finally:
        stage.learn = learn


def test_tensorboard_and_trackio_either_or_both(runs, monkeypatch):
    told, drawn = [], []
    fake = types.SimpleNamespace(init=lambda **k: told.append(k["name"]), log=lambda f, step: told.append(step))
    board = types.SimpleNamespace(SummaryWriter=lambda where: types.SimpleNamespace(
        add_scalar=lambda k, v, n: drawn.append((k, n))))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    start(runs, name="both", report_to="both", max_iter=1, log_every=1)
    assert told[0].endswith("both") and 1 in told and ("total_loss", 1) in drawn and ("map_50", 1) in drawn
    monkeypatch.setitem(sys.modules, "trackio", None)  # not installed
    with pytest.raises(InputError, match="trackio is not installed"):
        start(runs, name="absent", report_to="trackio", max_iter=1)


def test_crowds_by_seed(runs):
    "Who is remembered of a crowd: the best scores, or a draw that a seed repeats."
    cfg = SMALL | dict(mode="evaluate", weights=weights_of(runs[0]), out=str(runs[0].folder.parents[1]))
    rows = []
    for crowd in (-1, -1, 4, 4):
        got = stage.run(stage.Config(**cfg | dict(crowd=crowd), name=f"crowd{len(rows)}"))
        rows.append((got.folder / "result.csv").read_bytes())
    assert rows[0] == rows[1] and rows[2] == rows[3]


def test_ava_bird_is_evaluated(shared, runs):
    "Folders of frames, seconds that are none: the check names the row, `repeat` takes the edge, and all is scored."
    cfg = SMALL | dict(mode="evaluate", data=str(shared / "realdata/ava_bird"), begin=64 / 30, fps=30, no_head=True,
                       weights=weights_of(runs[0]))
    with pytest.raises(InputError, match="1 key frames cannot be used"):
        stage.run(stage.Config(**cfg, name="bird"))
    got = stage.run(stage.Config(**cfg | dict(missing="repeat"), name="bird2"))
    assert got.metrics["clips"] == 8 and got.metrics["people"] == 8
    assert 0 < got.metrics["map_50"] <= 1 and (got.folder / "report.html").exists()
    assert len(read_ava(got.folder / "result.csv", scored=True)) == 64


def test_real_films_are_evaluated(shared, runs, tmp_path):
    "A film with a damaged end, and one of three frames a second; labels by hand."
    (tmp_path / "movies").mkdir()
    for name in ("demo", "mmtracking_demo"):
        (tmp_path / f"movies/{name}.mp4").symlink_to(shared / f"realdata/videos/{name}.mp4")
    rows = [("demo", s, [.1, .2, .5, .9], 1, 0) for s in (0, 5, 9)] + [("mmtracking_demo", 1, [.3, .3, .4, .8], 2, 0)]
    m, s, b, a, p = zip(*rows)
    save_ava(tmp_path / "annotations/val.csv", ava_rows(np.array(m, object), s, np.array(b), a, p))
    got = stage.run(stage.Config(**SMALL | dict(mode="evaluate", data=str(tmp_path), no_head=True,
                                                weights=weights_of(runs[0])), name="real"))
    assert got.metrics["clips"] == 11 and got.metrics["people"] == 4  # all seconds from first to last
    assert got.metrics["empty"] == 7 and 0 <= got.metrics["map_50"] <= 1


@pytest.fixture(scope="module")
def launch(runs, film, tmp_path_factory):
    "One launch of two processes: a toy, evaluation, prediction, and a training in which one of them is killed."
    out, w, (top, _) = tmp_path_factory.mktemp("ranks"), weights_of(runs[0]), film
    todo = dict(evaluate=SMALL | dict(mode="evaluate", weights=w),
                predict=dict(mode="predict", data=str(top / "films/match.mp4"), boxes=str(top / "match.txt"),
                             weights=w),
                train=SMALL | dict(max_iter=4))
    todo = {k: v | dict(name=k, out=str(runs[0].folder.parents[1])) for k, v in todo.items()}
    got = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(Path(__file__).parent / "slowfast_ranks.py"), str(out), json.dumps(todo)],
        capture_output=True, text=True, timeout=900, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return out, todo, got


def test_two_ranks_learn_what_one_does(launch):
    "The same steps shared by two processes: loss, gradients, weights and memory."
    out, _, got = launch
    assert (out / "two.pt").exists(), got.stderr[-3000:]
    two = torch.load(out / "two.pt", weights_only=True)
    t = training.Trainer(toy.small(), training.Recipe(lr=.05, warmup=2, max_iter=9, steps=(7,)), shake=False)
    grads, step = [], t.opt.step
    t.opt.step = lambda: (grads.append({k: p.grad.clone() for k, p in t.model.named_parameters()}), step())
    for k in range(3):
        last = t.step([toy.clip(2 * k), toy.clip(2 * k + 1, 3)])
    assert two["total_loss"] == pytest.approx(last["total_loss"], rel=1e-4)
    assert two["accuracy_posture"] == pytest.approx(last["accuracy_posture"], abs=1e-5)
    for k, v in grads[0].items():
        assert torch.allclose(v, two["grads"][k], atol=1e-4 * max(1e-2, float(v.abs().max()))), k
    for k, v in t.model.state_dict().items():
        assert torch.allclose(v, two["model"][k], atol=1e-5), k
    assert two["seconds"] == sorted(s for _, s in t.pool.entries)
    assert torch.allclose(two["fifth"], t.pool.get("film", 5)[0], atol=1e-4)


def test_two_ranks_look_at_each_clip_once(launch, runs):
    "Evaluation and prediction shared by two processes: every clip once, one writer, the same results."
    out, todo, got = launch
    for name in ("evaluate", "predict"):
        assert (out / f"{name}-0.json").exists(), got.stderr[-3000:]
        first, second = (json.loads((out / f"{name}-{k}.json").read_text()) for k in (0, 1))
        read = [tuple(k) for k in first["read"] + second["read"]]
        assert len(read) == len(set(read)) and first["read"] and second["read"]
        assert not second["opened"] and first["opened"]
        one = stage.run(stage.Config(**todo[name] | dict(name=name + "-alone")))
        assert len(read) == one.metrics.get("clips", one.metrics.get("seconds"))
        a, b = (read_ava(runs[0].folder.parent / f"{n}/result.csv", scored=True)
                for n in (name, name + "-alone"))
        assert a.keys() == b.keys() and (a.action == b.action).all()
        assert abs(a.score - b.score).max() <= 1e-4 and abs(a.boxes_xyxy_rel - b.boxes_xyxy_rel).max() <= 1e-4


def test_a_killed_rank_ends_the_run_and_it_goes_on(launch, runs):
    "The launcher stops the other process; nothing counts as finished; one process takes it to its end."
    out, todo, got = launch
    folder = runs[0].folder.parent / "train"
    assert got.returncode != 0 and "Signal 9" in got.stderr, got.stderr[-3000:]
    assert (folder / "checkpoints/last").resolve().name == "iter-0000002"
    assert not (folder / "metrics.json").exists()
    done = stage.run(stage.Config(**todo["train"]))
    assert (folder / "checkpoints/last").resolve().name == "iter-0000004" and done.metrics["map_50"] is not None
