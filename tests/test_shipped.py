"""What ships does what README says of it, on worlds that no training saw."""
import json
from pathlib import Path

import pytest

from crowdlens.core import runs
from crowdlens.metrics.detection import evaluate
from crowdlens.models.detector import Detector
from crowdlens.train_world import Config, judge

TINY = runs.assets() / "data" / "tiny"


FLOORS = {"court": {"person": 0.84, "head": 0.80}, "street": {"Car": 0.80, "Bike": 0.65, "Pedestrian": 0.50}}


@pytest.mark.parametrize("scene", FLOORS)
def test_a_detector_finds_what_it_should(scene):
    "AP50 on 64 held-out frames, of the classes that are frequent enough there."
    net = Detector(TINY / scene)
    gt, results, *_ = judge(net.model, Config(name="t", scene=scene, test_frames=64), net.geometry)
    got = evaluate(gt, results)
    for name, floor in FLOORS[scene].items():
        assert got[f"map_50/{name}"] > floor, got


def test_what_ships_is_small():
    files = [p for p in TINY.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 30e6
    for p in TINY.glob("*/crowdlens.json"):
        info = json.loads(p.read_text())
        assert info["provenance"]["command"].startswith("python -m crowdlens."), p
        assert "/tmp" not in p.read_text() and str(Path.home()) not in p.read_text()
        assert (p.parent / "model.safetensors").stat().st_size < 5e6


def test_the_action_net_tells_actions_apart():
    "On 24 clips of held-out worlds; waving among the standing is what needs motion."
    from crowdlens import train_actions as a
    from crowdlens.models.slowfast import load_folder
    cfg = a.Config(name="t", test_clips=24)
    got = a.figures(*a.predict(load_folder(TINY / "actions"), cfg, a.held_out(cfg, 30_000)))
    assert got["map"] > .8 and got["map/wave"] > .6 and got["map/serve"] > .6, got


def metrics(folder):
    return json.loads((TINY / folder / "crowdlens.json").read_text())["metrics"]


def test_readme_says_what_was_measured():
    "Each row's numbers are those that the network carries."
    rows = {line.split("`")[1]: line.split("|")[3] for line in (runs.assets() / "README.md").read_text().splitlines()
            if line.startswith("| `")}
    def has(folder, **want):
        for what, v in want.items():
            assert f"{v:.2f}".lstrip("0") in rows[folder], (folder, what, v, rows[folder])
    m = metrics("actions")
    has("actions", mAP=m["map"], chance=m["chance"], **{a: m[f"map/{a}"] for a in ("stand", "walk", "jump", "serve", "wave")})
    m = metrics("actions_ia")
    has("actions_ia", **{f"{w} {a}": m[f"{w}/{a}"] for w in ("without", "all") for a in (
        "another jumps", "ball flies", "after a jump")})
    m = metrics("tracker")
    has("tracker", **{k: m[p + k] for k in ("HOTA", "DetA", "AssA") for p in ("", "bytetrack/")})
    assert f"{m['IDSW']} id switches" in rows["tracker"]
