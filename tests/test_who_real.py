"""Real footage through stages 05 and 07 with the networks that ship: films
from nothing, sequences from their own detections or a simulated detector.
They know the drawn court alone: this is not good, and the report says so."""
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

TOP = Path(__file__).resolve().parents[1]
MADE = ["detections.json", "tracks.txt", "actions.csv", "who_does_what.parquet", "annotated.mp4", "figures/timeline.png",
        "report.html"]


@pytest.fixture
def real(shared, monkeypatch):
    "bench/real.py as a module, its folder the one of these tests."
    monkeypatch.syspath_prepend(str(TOP / "bench"))
    monkeypatch.delitem(sys.modules, "real", raising=False)
    import real
    monkeypatch.setattr(real, "REAL", shared / "realdata")
    return real


def whole(folder):
    "All outputs are there, and the page says what to think of them."
    assert [m for m in MADE if not (folder / m).is_file()] == []
    page = (folder / "report.html").read_text()
    assert "learnt on the built-in world alone" in page and "the result is not good" in page
    assert "not good" in json.loads((folder / "result.json").read_text())["note"]
    n = len((folder / "tracks.txt").read_text().splitlines())
    assert pq.read_metadata(folder / "who_does_what.parquet").num_rows == n


@pytest.mark.parametrize("name,frames", [("videos/demo.mp4", 30), ("videos/mmtracking_demo.mp4", 8)])
def test_films_from_nothing(real, tmp_path, name, frames):
    got = real.film(name, tmp_path, frames=frames)
    assert got["frames"] == frames and got["boxes_a_frame"] > 0
    folder = tmp_path / "07_who_does_what" / Path(name).stem
    whole(folder)
    assert "The detector" in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["mot17_mini/MOT17-04-FRCNN", "mot17_mini/MOT17-05-FRCNN",
                                  "mot_volleyball/volleyball_7_38025", "mot_volleyball/volleyball_7_51725",
                                  "mot_tud_stadtmitte/TUD-Stadtmitte"])
def test_sequences_from_their_own_boxes(real, tmp_path, name):
    "What comes out is what is kept; ByteTrack's, where its library is installed, to a hair."
    got = real.sequence(name, tmp_path)
    whole(tmp_path / "07_who_does_what" / Path(name).name)
    kept, = [r for r in json.loads((TOP / "data/real_runs.json").read_text())["sequences"] if r["sequence"] == name]
    if "ByteTrack" in got:
        assert got["ByteTrack"] == pytest.approx(kept["ByteTrack"], abs=2e-3)
    assert got["MOTRv2"] == pytest.approx(kept["MOTRv2"], abs=.05)
    assert got["frames"] == kept["frames"] and got["boxes_a_frame"] == pytest.approx(kept["boxes_a_frame"], abs=.1)
    assert got.get("known") == kept.get("known")
