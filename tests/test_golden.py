"""The golden runner: recorded figures are met, and a wrong number is seen."""
import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import golden
import goldenkit
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent

# every kind that has a check; its cases under golden/ must pass
DONE = {("dfine", "detection-metrics"), ("dfine", "wbf"), ("dfine", "submission")}
DONE |= {("dfine", kind) for kind in "forward criterion loss recipe".split()}  # D-FINE: weights, loss, recipe
DONE |= {("motrv2", kind) for kind in "data infer train units".split()}
DONE |= {("slowfast", kind) for kind in "ava_eval boxes color_jitter csv_to_coco dataset loader_matching predictions_to_csv resize sampling".split()}  # data and scores of actions
DONE |= {("slowfast", kind) for kind in
         "forward load_pretrained loss roi_align schedule train two_stage".split()}  # the network, its training


@pytest.mark.parametrize("system,kind", sorted(DONE))
def test_recorded(shared, system, kind):
    "All cases of a kind pass at their stated tolerance."
    lines = []
    assert golden.run(shared / "golden" / system, {(system, kind)}, lines.append) == 0, "\n".join(lines)


def test_every_check_is_listed():
    "A new check is run by this suite only when it stands in DONE."
    assert set(goldenkit.KINDS) == DONE


def outputs(data):
    "(container, key) of each recorded number that is a result."
    skip = {"tolerance", "conf_thresh", "iou_thresh", "thresholds", "f1_in", "fps", "max_fps", "boxes_list",
            "scores_list", "labels_list", "kwargs", "inputs", "parameters", "detections"}

    def walk(x):
        pairs = x.items() if isinstance(x, dict) else enumerate(x)
        for k, v in pairs:
            if k in skip:
                continue
            if isinstance(v, (dict, list)):
                yield from walk(v)
            elif isinstance(v, (int, float)) and not isinstance(v, bool):
                yield x, k
    return walk(data)


@pytest.mark.parametrize("name", ["metrics_hand", "metrics_dense", "wbf", "submission"])
def test_a_changed_number_fails(shared, name, tmp_path):
    "One result moved by three tolerances is a failure, wherever it stands."
    path = shared / "golden" / "dfine" / f"{name}.json"
    data = json.loads(path.read_text())
    tol = data["tolerance"] if data["tolerance"] != "exact" else 1e-6
    n = len(list(outputs(data)))
    for i in random.Random(0).sample(range(n), min(n, 25)):
        new = copy.deepcopy(data)
        box, key = list(outputs(new))[i]
        step = 3e-3 if "bbox" in str(path) or (name == "wbf" and abs(box[key]) > 1) else 3 * tol
        box[key] += step
        top, what = goldenkit.score(path, new)
        assert top > 1, (name, key, box[key], what)


def test_comparison_sees_shape_kind_and_absence():
    w = goldenkit.worst
    assert w(1.0, 1.0 + 5e-7, 1e-6) == pytest.approx(0.5, rel=1e-3)
    assert w([1, 2], [1, 2, 3], 1) == w({"a": 1}, {"b": 1}, 1) == w(None, 0.0, 1) == np.inf
    assert w(np.nan, 1.0, 1) == w(1.0, np.nan, 1) == w(np.zeros(2), np.zeros(3), 1) == np.inf
    assert w("a", "b", 1) == w(True, 1, 1) == np.inf and w(None, None, 1) == w([], [], 0) == 0
    assert w(101.0, 100.0, 0, 0.01) == pytest.approx(1)
    assert w(np.array([1.0, np.inf]), np.array([1.0, np.inf]), 0) == 0


def call(folder):
    got = subprocess.run([sys.executable, str(HERE / "golden.py"), str(folder)], capture_output=True, text=True)
    return got.returncode, got.stdout.splitlines()


def test_command_line(tmp_path):
    "Unknown kinds, broken files and empty folders are failures."
    assert call(tmp_path) == (1, ["0 passed, 0 failed"])
    (tmp_path / "data.json").write_text('{"a": 1}')
    assert call(tmp_path) == (1, ["0 passed, 0 failed"])
    sub = tmp_path / "deep" / "er"
    sub.mkdir(parents=True)
    (sub / "x.json").write_text('{"system": "dfine", "kind": "no such thing", "tolerance": 1}')
    rc, lines = call(tmp_path)
    assert rc == 1 and lines[0].startswith("FAIL deep/er/x ") and lines[-1] == "0 passed, 1 failed"
    good = {"system": "dfine", "kind": "submission", "tolerance": "exact", "image_ids": {"camera1_A_0": 110},
            "thresholds": {"Bus": 0.7}, "detections": [], "submission": [], "score_examples": []}
    (sub / "y.json").write_text(json.dumps(good))
    (sub / "z.json").write_text("{")
    rc, lines = call(tmp_path)
    assert rc == 1 and [line.split()[0] for line in lines[:-1]] == ["FAIL", "PASS", "FAIL"]
    (sub / "x.json").unlink(), (sub / "z.json").unlink()
    assert call(tmp_path)[0] == 0


def test_a_check_that_dies_is_one_failure(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"system": "dfine", "kind": "detection-metrics"}))
    lines = []
    assert golden.run(tmp_path, out=lines.append) == 1
    assert lines[0].startswith("FAIL m") and lines[1] == "0 passed, 1 failed"
