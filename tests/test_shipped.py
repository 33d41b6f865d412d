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
