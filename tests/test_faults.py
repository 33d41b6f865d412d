"""Faults that no other file provokes: killed while detecting, checkpoints cut
in half, films with a broken tail; and that the page of faults names tests that
are there."""
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crowdlens.core import runs
from crowdlens.core.config import Config
from crowdlens.core.files import InputError
from crowdlens.core.frames import write_film

TOP = Path(__file__).resolve().parents[1]

DETECT = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from crowdlens.models.detect_files import predict
from test_fisheye import Half
class Dies(Half):
    def detect(self, images, **kw):
        if self.asked >= 2:  # the first two are written down by then
            time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(images, **kw)
predict(Dies(), Path(sys.argv[1]), Path(sys.argv[2]), batch=1)
"""


def test_killed_while_detecting_goes_on_and_is_equal(tmp_path):
    from test_fisheye import Half, files_of, toy_set

    from crowdlens.models.detect_files import predict
    images, _ = toy_set(tmp_path, 5)
    predict(Half(), images, tmp_path / "a", batch=1)
    got = subprocess.run([sys.executable, "-c", DETECT, images, tmp_path / "b", TOP / "tests"], capture_output=True, text=True)
    assert got.returncode == -signal.SIGKILL, got.stderr[-2000:]
    assert not (tmp_path / "b" / "results.json").exists()
    with open(tmp_path / "b" / "detections.jsonl", "a") as f:
        f.write('{"image": "cut in the mid')  # as a kill within a write leaves it
    d = Half()
    predict(d, images, tmp_path / "b", batch=1)
    assert d.asked == 3
    a, b = (json.loads((tmp_path / k / "results.json").read_text()) for k in "ab")
    assert a == b and set(files_of(tmp_path / "a")) == set(files_of(tmp_path / "b"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_cut_checkpoint_is_named(tmp_path):
    from safetensors.torch import save_file

    from crowdlens.models import motrv2, slowfast
    nets = dict(tracker=dict(design={}), actions=dict(config=slowfast.ActionConfig(slowfast.TINY).to_dict()))
    for kind, more in nets.items():
        top = tmp_path / kind
        top.mkdir()
        save_file({"w": torch.zeros(2000)}, top / "model.safetensors")
        cut(top / "model.safetensors")
        (top / "crowdlens.json").write_text(json.dumps(dict(kind=kind) | more))
        with pytest.raises(InputError, match="model.safetensors"):
            (motrv2.load if kind == "tracker" else slowfast.load)(top)


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
def test_a_run_does_not_go_on_from_half_a_checkpoint(tmp_path, file):
    with runs.Run("00_toy", Config(out=str(tmp_path))) as run:
        run.save("epoch-0001", {"w": torch.ones(500)}, dict(kind="toy"), dict(epoch=1))
        cut(run.folder / "checkpoints" / "last" / file)
        with pytest.raises(InputError, match="epoch-0001: this checkpoint cannot be read"):
            run.resume()


def test_a_clip_whose_loss_is_no_number_is_kept(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from crowdlens.models import motrv2, motrv2_loss
    from crowdlens.models import motrv2_training as mt
    bad = SimpleNamespace(total=torch.tensor(float("nan")), samples=2.)
    monkeypatch.setattr(mt, "clip_loss", lambda *a, **k: bad)
    box = np.float32([[.5, .5, .1, .2]])
    clip = motrv2_loss.Clip([np.zeros((64, 96, 3), np.uint8)], [np.c_[box, [[.9]]]], [box], [np.array([0])])
    clips = type("One", (), dict(__len__=lambda s: 1, clip=lambda s, e, i: clip))()
    with pytest.raises(InputError, match="the loss of clip 1 is nan") as e:
        mt.tune(motrv2.MOTRv2(motrv2.SMALL), clips, 1, keep=tmp_path / "tuning")
    kept = torch.load(e.value.path, weights_only=True)
    assert kept["frames"][0].shape == (64, 96, 3) and kept["ids"][0].tolist() == [0] and len(kept["proposals"]) == 1


def film(path, n=40, size=(64, 96)):
    "A film that has lost its second half; its frames that are left."
    from crowdlens.core.frames import read_frames
    rng = np.random.default_rng(0)
    write_film(path, [rng.integers(0, 255, (*size, 3), np.uint8) for _ in range(n)], 10)
    cut(path)
    return sum(1 for _ in read_frames(path))


def test_frames_of_a_cut_film(tmp_path):
    from crowdlens.core.track_data import extract_frames
    left = film(tmp_path / "a.webm")
    seq = extract_frames(tmp_path / "a.webm", tmp_path / "a")
    assert 0 < len(seq) == left < 40 and seq.image(len(seq)).shape == (64, 96, 3)


def test_who_does_what_in_a_cut_film(tmp_path):
    from crowdlens import who_does_what as stage
    left = film(tmp_path / "a.webm")
    doc = [dict(image_id=k, category_id=1, bbox=[10 + k, 10, 20, 40], score=.9) for k in range(1, left + 1)]
    (tmp_path / "found.json").write_text(json.dumps(doc))
    (tmp_path / "tracks.txt").write_text("".join(f"{k},1,{10 + k},10,20,40,0.9,-1,-1,-1\n" for k in range(1, left + 1)))
    res = stage.run(stage.Config(source=str(tmp_path / "a.webm"), detections=str(tmp_path / "found.json"), actions="none",
                                 tracks=str(tmp_path / "tracks.txt"), out=str(tmp_path / "o")))
    assert res.metrics["frames"] == left and res.metrics["persons"] == 1
    assert (res.folder / "annotated.mp4").stat().st_size > 0


def test_the_page_names_tests_that_are_there():
    page = json.loads((TOP / "nbs/guides/faults.ipynb").read_text())
    text = "".join("".join(c["source"]) for c in page["cells"])
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    lost = [n for n in named if f"def {n[1]}(" not in (TOP / "tests" / n[0]).read_text()]
    assert len(named) > 25 and not lost, lost


def test_an_error_that_cannot_be_renamed_arrives_as_it_is(tmp_path):
    "PyAV's errors keep the name of the file that they were made with."
    import av

    from crowdlens.core.files import atomic
    with pytest.raises(av.error.FileNotFoundError):
        with atomic(tmp_path / "film.mp4"):
            raise av.error.FileNotFoundError(2, "gone")
    assert not list(tmp_path.iterdir())
