"""Memory does not grow with the length of a film: stages 05 and 07 from the
film to the report, with networks that cost nothing (`make bench PART=films`
measures it with the real ones, one minute against ten)."""
import json
import subprocess
import sys

import pytest

SETUP = """
import json, resource, sys
from types import SimpleNamespace
import numpy as np
from crowdlens.core.coco import LabelMap
from crowdlens.core.frames import write_film
from crowdlens.models import action_running
from crowdlens.models.motrv2 import Tracks
top, N, FPS = sys.argv[1], 12, 5
def where(k):
    "Twelve people who walk to and fro."
    x = 4 + 3.*np.arange(N) + 10*np.sin(k/20 + np.arange(N))**2
    return np.c_[x, 8 + x/8, x + 12, 40 + x/8]
def film(name, seconds):
    write_film(f"{top}/{name}.mp4", (np.full((96, 160, 3), k % 200, np.uint8) for k in range(seconds*FPS)), FPS)
    return f"{top}/{name}.mp4"
class Net:
    "A detector."
    labels, k = LabelMap((0,), ("person",)), 0
    def detect(self, images, batch=8, threshold=0., **kw):
        self.k += len(images)
        return [(where(self.k - len(images) + i), np.full(N, .9), np.zeros(N, int)) for i in range(len(images))]
class Tracker:
    "As MOTRv2: it sees every frame."
    design, see = None, None
    def track(self, frames, proposals, **kw):
        for k, (im, p) in enumerate(zip(frames, proposals)):
            yield Tracks(np.arange(N), where(k), np.full(N, .9), np.ones(N, bool))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
def measure(look):
    look("warm", 20)
    look("short", 20); one = peak()
    look("long", 200)
    print(json.dumps([one, peak()]))
"""

WHO = SETUP + """
from crowdlens import who_does_what as stage
from crowdlens.models.slowfast import load
acts = load(stage.runs.shipped("actions"))
acts.info["rule"] = dict(short=32, long=64)
stage.open_detector, stage.open_tracker = (lambda cfg: Net()), (lambda cfg: Tracker())
stage.open_actions = lambda cfg: acts
def look(name, seconds):
    res = stage.run(stage.Config(source=film(name, seconds), tracker="x", name=name, out=top))
    assert res["frames"] == seconds*FPS and res["persons"] == N
    assert len((res.folder/"tracks.txt").read_text().split()) == N*seconds*FPS
measure(look)
"""

RESULTS = SETUP + """
from crowdlens.models.film_steps import lines_of_results
def look(name, seconds):
    n = 100*seconds
    with open(f"{top}/{name}.json", "w") as f:
        f.write("[" + ",".join(json.dumps(dict(image_id=k, category_id=1, bbox=[1.5, 2, 3, 4], score=.5))
                               for k in range(1, n + 1) for _ in range(N)) + "]")
    lines_of_results(f"{top}/{name}.jsonl", f"{top}/{name}.json", n)
measure(look)
"""

TRACK = SETUP + """
import torch
from crowdlens import motrv2_embed as stage
from crowdlens.core.det_db import write_det_db
class Wide(Tracker):
    yolox_embed = torch.nn.Embedding(1, 8)
    def see(self, x): return x
stage.network = lambda cfg, r: Wide()
stage.byte_track = lambda *a, **k: None
def look(name, seconds):
    db = {f"{name}/img1/{k:08d}.txt": np.c_[where(k)[:, :2], where(k)[:, 2:] - where(k)[:, :2], np.full(N, .9)]
          for k in range(1, seconds*FPS + 1)}
    write_det_db(f"{top}/{name}.json", db)
    res = stage.run(stage.Config(mode="predict", data=film(name, seconds), det_db=f"{top}/{name}.json", nms=0., name=name,
                                 out=top))
    assert len((res.folder/f"tracks/original/{name}.txt").read_text().split()) == N*seconds*FPS
measure(look)
"""


@pytest.mark.parametrize("code,most", [(WHO, 20), (TRACK, 20), (RESULTS, 60)], ids=["07", "05", "results"])
def test_ten_times_the_film_takes_no_more_memory(tmp_path, code, most):
    "In MB: frames, boxes as Python objects, figures and pages do not pile up; rows of tracks are a few numbers each."
    got = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]
    one, ten = json.loads(got.stdout.splitlines()[-1])
    print(f"{one:.1f} MB, {ten:.1f} MB")
    assert ten - one < most, (one, ten)
