"""Memory of long films: `make bench PART=films`, or `python bench/films.py [SECONDS SECONDS]`.

One minute and ten of the same small court, 160x96 pixels, five frames a
second, eight people: through the whole of stage 07 with the networks that ship
(ByteTrack follows where no tracker does) and through stage 05's tracking
(frames, det_db, tracks, film, report), each in a process of its own. What
counts is how much the peak of the process's memory grows. Results go to
bench/results/films.json."""
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
FPS, SIZE, PEOPLE = 5, (160, 96), 8


def draw(top, seconds):
    "The court as a MOT sequence and as a film."
    from crowdlens.core.frames import read_frames, write_film
    from crowdlens.core.world import World
    from crowdlens.core.worldfiles import write_mot
    seq = Path(top) / f"court{seconds}"
    write_mot(seq, World("court", 20_010, PEOPLE, SIZE, FPS), seconds * FPS)
    write_film(f"{top}/court{seconds}.mp4", (im for _, _, im in read_frames(seq / "img1")), FPS)


def who(top, seconds):
    "Stage 07 from the film to the report."
    from crowdlens import who_does_what as stage
    ours = (TOP / "data/tiny/tracker/crowdlens.json").is_file()
    res = stage.run(stage.Config(source=f"{top}/court{seconds}.mp4", tracker="" if ours else "bytetrack",
                                 out=f"{top}/out{seconds}"))
    return dict(frames=res["frames"], rows=sum(1 for _ in open(res.folder / "tracks.txt")),
                tracker="MOTRv2" if ours else "ByteTrack")


def track(top, seconds):
    "Stage 05 in mode predict, its boxes from a simulated detector."
    from crowdlens import motrv2_embed as stage
    res = stage.run(stage.Config(mode="predict", data=f"{top}/court{seconds}", detector="dfine", out=f"{top}/out{seconds}"))
    one = next((res.folder / "tracks/original").iterdir())
    return dict(frames=seconds * FPS, rows=sum(1 for _ in open(one)), tracker="MOTRv2")


def child(what, top, seconds):
    "Run a part here; its figures as a line."
    t0 = time.time()
    got = dict(draw=draw, who=who, track=track)[what](top, seconds) or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(got | dict(seconds=seconds, peak_mb=round(peak, 1), took=round(time.time() - t0, 1))))


def apart(what, top, seconds):
    "Run a part in a process of its own."
    got = subprocess.run([sys.executable, __file__, what, top, str(seconds)], stdout=subprocess.PIPE, text=True, check=True,
                         env=os.environ | {"CROWDLENS_BATCH": "1", "PYTHONPATH": str(TOP)})
    return json.loads(got.stdout.splitlines()[-1])


def main(lengths=(60, 600)):
    from crowdlens.core import runs
    out = dict(date=datetime.date.today().isoformat(), machine=runs.device(), load=round(os.getloadavg()[0], 1),
               command="make bench PART=films", fps=FPS, size=SIZE, people=PEOPLE, parts={})
    with tempfile.TemporaryDirectory() as top:
        for s in lengths:
            apart("draw", top, s)
        for what in ("who", "track"):
            rows = [apart(what, top, s) for s in lengths]
            out["parts"][what] = dict(rows=rows, grows_mb=round(rows[-1]["peak_mb"] - rows[0]["peak_mb"], 1))
            print(what, json.dumps(out["parts"][what], indent=1), flush=True)
    if tuple(lengths) == (60, 600):
        (TOP / "bench/results/films.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("draw", "who", "track"):
        child(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main(tuple(map(int, sys.argv[1:])) or (60, 600))
