"""Real footage through stages 05 and 07 with the networks that ship:
`make bench PART=real`, or `python bench/real.py [TRACKER]`.

The films and sequences are those of realdata/ under $CROWDLENS_SHARED (beside
the checkout: ../shared); they are not part of the project. The networks know
the drawn court alone, so that the figures say what goes through, and not how
good crowdlens is. Sequences are tracked from their own detections (`det.txt`);
one that has none, from a detector simulated on its truth. Results go to
data/real_runs.json, which stage 07 shows."""
import datetime
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

TOP = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("CROWDLENS_SHARED", TOP.parent / "shared")) / "realdata"
# film -> frames looked at; sequence -> how the scores of its det.txt come to 0..1, None: it has none
FILMS = {"videos/demo.mp4": 84, "videos/mmtracking_demo.mp4": 8}
SEQUENCES = {"mot_tud_stadtmitte/TUD-Stadtmitte": "rank", "mot17_mini/MOT17-04-FRCNN": "none",
             "mot17_mini/MOT17-05-FRCNN": "none", "mot_volleyball/volleyball_7_38025": None,
             "mot_volleyball/volleyball_7_51725": None}
KEYS = "HOTA", "MOTA", "IDF1"


def ours():
    "Whether a tracker ships."
    return (TOP / "data/tiny/tracker/crowdlens.json").is_file()


def weights(tracker=""):
    "What the tracker's file holds, in twelve letters."
    p = Path(tracker or TOP / "data/tiny/tracker") / "model.safetensors"
    return hashlib.sha256(p.read_bytes()).hexdigest()[:12] if p.is_file() else None


def figures(found, before=""):
    "Those that are shown."
    return {k: round(found[before + k], 4) for k in KEYS}


def start(film, top, frames):
    "The first frames of a film, as one of its own."
    from crowdlens.core.frames import film_info, read_frames, write_film
    to = Path(top) / f"{film.stem}.mp4"
    ims = (im for k, _, im in read_frames(film) if k <= frames)
    write_film(to, ims, film_info(film).fps, quality=20)
    return to


def look(out, name, **cfg):
    "Stage 07; what came out."
    import pyarrow.parquet as pq

    from crowdlens import who_does_what as stage
    from crowdlens.models.film_detect import whole_lines
    res = stage.run(stage.Config(out=str(out), name=name, **cfg))
    boxes = [len(r["scores"]) for r in whole_lines(res.folder / "detections.jsonl")]
    does = pq.read_table(res.folder / "who_does_what.parquet")["action"].to_pylist()
    said = Counter(d.split(", ")[0] for d in does if d)
    return res, dict(frames=res["frames"], boxes_a_frame=round(float(np.mean(boxes)), 1), persons=res["persons"],
                     rows=len(does), said={k: round(n / said.total(), 2) for k, n in said.most_common()})


def film(name, out, tracker="", frames=0):
    "A film through stage 07, whole or its first frames."
    src = REAL / name
    with tempfile.TemporaryDirectory() as top:
        one = start(src, top, frames or FILMS[name])
        follow = tracker or ("" if ours() else "bytetrack")
        return look(out, src.stem, source=str(one), tracker=follow)[1] | dict(film=name)


def sequence(name, out, tracker=""):
    "A sequence through stage 05, and its tracks through stage 07."
    from crowdlens import motrv2_embed as stage
    from crowdlens.core.det_db import read_det_db
    from crowdlens.core.mot import save_mot
    from crowdlens.core.track_data import find_sequences
    from crowdlens.models.track_steps import byte_track
    rule, src = SEQUENCES[name], REAL / name
    cfg = dict(detector="det.txt", score_rule=rule) if rule else dict(detector="yolox")
    cfg |= dict(checkpoint=str(tracker), mode="evaluate", data=str(src), out=str(out), films=0, name=src.name)
    res = stage.run(stage.Config(**cfg))
    m, rows = res.metrics, dict(sequence=name, boxes="det.txt" if rule else "simulated on the truth")
    db, tracks = res.folder / "det_db/main_test.json", next((res.folder / "tracks/original").iterdir())
    if "ByteTrack_original/HOTA" in m:  # the library trackers is installed
        rows["ByteTrack"] = figures(m, "ByteTrack_original/")
    if tracker or ours():
        rows["MOTRv2"] = figures(m, "original/")
    else:
        seq, = find_sequences(src)
        tracks = out / f"{src.name}.txt"
        save_mot(tracks, byte_track(seq, read_det_db(db)))
    found = [dict(image_id=i, category_id=1, bbox=[float(v) for v in r[:4]], score=float(r[4]))
             for i, (_, v) in enumerate(sorted(read_det_db(db).items()), 1) for r in np.reshape(v, (-1, 5))]
    (out / f"{src.name}.json").write_text(json.dumps(found))
    res, got = look(out, src.name, source=str(src / "img1"), detections=str(out / f"{src.name}.json"), tracks=str(tracks))
    known = REAL / name.split("/")[0] / "tracker/expected.json"
    if known.is_file():
        rows["known"] = figures(json.loads(known.read_text())["computed_trackeval"])
    return rows | got


def main(tracker=""):
    from crowdlens.core.files import write_json
    with tempfile.TemporaryDirectory() as top:
        out = Path(os.environ.get("CROWDLENS_OUT") or top)
        got = dict(date=datetime.date.today().isoformat(), command="make bench PART=real",
                   tracker="MOTRv2" if tracker or ours() else "ByteTrack", weights=weights(tracker),
                   films=[film(n, out, tracker) for n in FILMS], sequences=[sequence(n, out, tracker) for n in SEQUENCES])
    write_json(TOP / "data/real_runs.json", got, 1)
    print(json.dumps(got, indent=1))


if __name__ == "__main__":
    if not REAL.is_dir():
        sys.exit(f"no {REAL}: set CROWDLENS_SHARED to the folder that holds realdata/")
    main(*sys.argv[1:])
