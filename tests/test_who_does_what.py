"""Stage 07: files in place of networks, memory, films of the world outside."""
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from crowdlens import who_does_what as stage
from crowdlens.core.files import InputError
from crowdlens.core.mot import read_mot
from crowdlens.core.world import World


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Two seconds of a small court, its truth, and perfect results for it."
    top = tmp_path_factory.mktemp("film")
    path = stage.world_film(top / "truth", World("court", 20_003, 5, (320, 192)), 51)
    true = json.loads((top / "truth" / "boxes.json").read_text())
    rows = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in true["annotations"]]
    (top / "results.json").write_text(json.dumps(rows))
    return path


def config(film, out, **kw):
    return stage.Config(name="t", out=str(out), source=str(film), actions="none", **kw)


def test_files_stand_in_for_networks(film, tmp_path):
    results, gt = film.parent.parent / "results.json", film.parent / "gt.txt"
    res = stage.run(config(film, tmp_path, detections=str(results), tracks=str(gt)))
    true = read_mot(gt)
    table = pq.read_table(res.folder / "who_does_what.parquet")
    assert len(table) == len(true) and res.metrics["frames"] == 51
    np.testing.assert_allclose(table["x0"].to_numpy(), true.boxes_xywh[:, 0], atol=0.01)
    assert len(json.loads((res.folder / "detections.json").read_text())) == len(json.loads(results.read_text()))
    assert (res.folder / "annotated.mp4").stat().st_size > 1000


def test_a_stopped_run_does_not_detect_twice(film, tmp_path, monkeypatch):
    kw = dict(detections=str(film.parent.parent / "results.json"), tracks=str(film.parent / "gt.txt"))
    monkeypatch.setattr(stage, "write_film", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stage.run(config(film, tmp_path, **kw))
    monkeypatch.undo()
    made = (tmp_path / stage.STAGE / "t" / "tracks.txt").stat().st_mtime_ns
    res = stage.run(config(film, tmp_path, **kw))
    assert (res.folder / "tracks.txt").stat().st_mtime_ns == made


def test_what_is_missing_is_said_before_the_work(tmp_path):
    with pytest.raises(InputError, match="no such film"):
        config(tmp_path / "none.mp4", tmp_path)


GROWTH = """
import resource, sys, numpy as np
from crowdlens.core.frames import write_film
from crowdlens.models import film_steps as steps
class Net:
    def detect(self, images, batch=8, threshold=0.):
        return [(np.tile([[5., 5, 20, 40]], (8, 1)), np.full(8, .9), np.zeros(8, int)) for _ in images]
def look(n, name):
    write_film(f"{sys.argv[1]}/{name}.mp4", (np.full((48, 64, 3), k % 250, np.uint8) for k in range(n)), 5)
    got = steps.detect(f"{sys.argv[1]}/{name}.jsonl", f"{sys.argv[1]}/{name}.mp4", Net())
    assert got == n
    found = steps.persons(f"{sys.argv[1]}/{name}.jsonl", 0)
    steps.save_tracks(f"{sys.argv[1]}/{name}.txt", ((range(len(b)), b, s) for b, s in found))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
look(300, "warm"); one = look(300, "one"); ten = look(3000, "ten")
print(one, ten)
assert ten - one < 8, (one, ten)
"""


def test_ten_minutes_take_no_more_memory_than_one(tmp_path):
    got = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]


@pytest.mark.parametrize("name", ["mot_tud_stadtmitte"])
def test_real_sequences_with_their_own_truth_as_tracks(shared, tmp_path, name):
    "Frames from elsewhere and tracks in a file go through; the detector is not asked to be good there."
    top = shared / "realdata" / name
    img, gt = next(top.rglob("img1")), next(top.rglob("gt.txt"))
    some = tmp_path / "img1"
    some.mkdir()
    for p in sorted(img.iterdir())[:6]:
        (some / p.name).symlink_to(p)
    rows = [r for r in gt.read_text().split("\n") if r and int(r.split(",")[0]) <= 6]
    (tmp_path / "gt.txt").write_text("\n".join(rows) + "\n")
    res = stage.run(config(some, tmp_path, tracks=str(tmp_path / "gt.txt")))
    assert res.metrics["frames"] == 6 and (res.folder / "annotated.mp4").is_file()


def test_a_network_that_remembers_hears_of_other_seconds_as_in_stage_06(film, tmp_path):
    import torch

    from crowdlens import slowfast_finetune as stage06
    from crowdlens.core.clips import open_frames
    from crowdlens.core.mot import mot_rows, save_mot
    from crowdlens.models import film_steps as steps
    from crowdlens.models.action_loss import Group
    from crowdlens.models.slowfast import TINY, ActionConfig, fresh
    from crowdlens.models.slowfast_interaction import Interaction
    rows = read_mot(film.parent / "gt.txt")
    rows = rows[rows.cls == 1]
    wide = mot_rows(rows.frame, rows.id, rows.boxes_xywh + [0, 0, 1, 1])  # stage 06 counts the last pixel in
    save_mot(tmp_path / "people.txt", wide)
    ia = Interaction("serial", dim=TINY.dim, inner=16, out=TINY.dim, before=1, after=1)
    net = fresh(ActionConfig(TINY, (Group("all", 2, False, 2.0),), 16, ia=ia), 1).eval()
    torch.manual_seed(0)
    for p in net.roi_heads.parameters():  # the start is zero: memory would not count; so it moves scores by .01
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.3)
    net.info = dict(rule=dict(short=96, long=160))
    got = list(steps.name_actions(net, film, rows, open_frames(film).times))
    cfg = stage06.Config(name="t", mode="predict", data=str(film), boxes=str(tmp_path / "people.txt"), weights="tiny")
    want = list(stage06.predict(cfg, net, film, tmp_path / "people.txt", [1, 2]))
    assert [s.second for s in got] == [s.frame.second for s in want] == [0, 1, 2]
    for a, b in zip(got, want):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
