"""Clips of a film beside cv2.VideoCapture and plain PyAV: 64 frames around
each second, CPU seconds of one core. `make bench PART=clips`; films given by
name are measured too. The built-in film's figures go to
bench/results/clips.json."""
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "threads;1"
import av
import cv2
import numpy as np

from crowdlens.core.clips import ClipRule, Film, pick_frames
from crowdlens.core.frames import write_film
from crowdlens.core.world import World

cv2.setNumThreads(1)
RULE = ClipRule()


def cpu(f):
    "CPU seconds of a call, and what it gave."
    t = time.process_time()
    got = f()
    return time.process_time() - t, got


def by_cv2(path, windows):
    cap = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    out = {}
    for a in windows:
        cap.set(cv2.CAP_PROP_POS_FRAMES, a)
        out[a] = [cv2.cvtColor(cap.read()[1], cv2.COLOR_BGR2RGB) for _ in range(RULE.span)]
    return out


def by_pyav(path, windows):
    "Seek, decode, convert: 64 frames of each window."
    out = {}
    with av.open(str(path)) as c:
        s = c.streams.video[0]
        s.codec_context.thread_count, rate = 1, float(s.average_rate)
        for a in windows:
            c.seek(int(a / rate / s.time_base), stream=s)
            ims = []
            for f in c.decode(s):
                if f.time < a / rate - 1e-3:
                    continue
                ims.append(f.to_ndarray(format="rgb24"))
                if len(ims) == RULE.span:
                    break
            out[a] = ims
    return out


def ours(path, windows, ahead):
    "The 36 frames that the pathways see, of each window."
    film, (slow, fast) = Film(path, ahead=ahead), pick_frames(RULE, RULE.span)
    used = np.unique(np.r_[slow, fast])
    return {a: dict(zip(used.tolist(), film.fetch([a + k for k in used]))) for a in windows}


def compare(path, name):
    n = len(Film(path))
    rate = round(1 / np.median(np.diff(Film(path).times)))
    order, rows = list(range(0, n - RULE.span, rate)), []
    shuffled = np.random.default_rng(0).permutation(order).tolist()
    for what, windows, ahead in (("in order", order, True), ("at random", shuffled, False)):
        peers = dict(cv2=cpu(lambda: by_cv2(path, windows)), pyav=cpu(lambda: by_pyav(path, windows)))
        t, got = cpu(lambda: ours(path, windows, ahead))
        off = max(int(abs(im.astype(int) - peers["pyav"][1][a][k]).max())
                  for a in windows for k, im in got[a].items())
        best = min(v for v, _ in peers.values())
        rows.append(dict(order=what, ours_ms=round(1e3 * t / len(windows), 1), times=round(best / t, 2), off=off,
                         **{f"{k}_ms": round(1e3 * v / len(windows), 1) for k, (v, _) in peers.items()}))
        print(f"{name}, {len(windows)} clips {what}: crowdlens {1e3 * t / len(windows):.0f} ms a clip, "
              + ", ".join(f"{k} {1e3 * v / len(windows):.0f} ms" for k, (v, _) in peers.items())
              + f": {best / t:.2f} times the better one; largest difference {off} grey levels", flush=True)
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "court.mp4"
        write_film(path, (im for im, _ in World("court", 3, 10, (640, 384)).frames(150)))
        rows = compare(path, "VP9 640x384")
    out = dict(date=datetime.date.today().isoformat(), cpus=os.cpu_count(), machine=platform.machine(),
               load=round(os.getloadavg()[0], 1), film="VP9 640x384, 6 s", rows=rows)
    (Path(__file__).parent / "results/clips.json").write_text(json.dumps(out, indent=1) + "\n")
    for path in sys.argv[1:]:
        compare(Path(path), Path(path).name)
