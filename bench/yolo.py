"""Speed of reading and converting YOLO sets, beside the peers.

    make bench PART=yolo                   10,000 images x 85 boxes
    .venv/bin/python bench/yolo.py --full  67,507 images, 5.7 million boxes

Each side runs in a process of its own, on the same files, in turns; a side
that runs several times counts with its median. Peak memory is the sum over
the process and its children; CPU seconds are those of all threads, and hardly
change when other programs keep the machine busy. The peers are installed into
.venv-bench."""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent
TOP = HERE.parent
ENV = TOP / ".venv-bench"
PEERS = ("ultralytics", "hotcoco", "globox", "supervision", "script")


def peers_python():
    "The interpreter of the peers' environment, made if it is missing."
    py, done = ENV / "bin/python", ENV / ".done"
    want = (HERE / "requirements.txt").read_text()
    if not done.exists() or done.read_text() != want:
        print("installing the peers into .venv-bench", flush=True)
        venv.create(ENV, with_pip=True)
        pip = [py, "-m", "pip", "install", "-qq"]
        subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
        # two OpenCV wheels in one folder: the headless one must win
        subprocess.run([py, "-m", "pip", "uninstall", "-q", "-y",
                        "opencv-python"], check=True)
        subprocess.run([*pip, "--force-reinstall", "--no-deps",
                        "opencv-python-headless"], check=True)
        done.write_text(want)
    return str(py)


def make_set(root, n, k, size=(640, 360), distinct=16, seed=0):
    "A YOLO set of `n` images with `k` boxes each, made once."
    if (root / "made").exists():
        return root
    rng = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir(parents=True, exist_ok=True)
    pics = [cv2.imencode(".jpg", cv2.GaussianBlur(rng.integers(
        0, 256, (size[1], size[0], 3), np.uint8), (0, 0), 3))[1].tobytes()
        for _ in range(distinct)]
    texts = []
    for i in range(min(n, 10_000)):
        wh = rng.uniform(.01, .1, (k, 2))
        c = rng.uniform(.06, .94, (k, 2))
        rows = zip(rng.integers(0, 2, k), *c.T, *wh.T)
        texts.append("".join(f"{q} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n"
                             for q, x, y, w, h in rows).encode())
    for i in range(n):
        (root / f"labels/train/{i:06d}.txt").write_bytes(texts[i % len(texts)])
        (root / f"images/train/{i:06d}.jpg").write_bytes(pics[i % distinct])
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\n"
        "names: [person, head]\n")
    (root / "made").touch()
    return root


def rss(pid):
    "MB of resident memory of a process and all below it."
    kids, mem, page = {}, {}, os.sysconf("SC_PAGE_SIZE") / 1e6
    for p in os.listdir("/proc"):
        if not p.isdigit():
            continue
        try:
            text = Path(f"/proc/{p}/stat").read_text()
        except OSError:
            continue
        stat = text.rpartition(")")[2].split()
        kids.setdefault(int(stat[1]), []).append(int(p))
        mem[int(p)] = int(stat[21]) * page
    todo, total = [pid], 0.
    while todo:
        p = todo.pop()
        total += mem.get(p, 0)
        todo += kids.get(p, [])
    return total


def measure(py, side, root, work):
    "One run of a side: seconds, total seconds, peak MB."
    env = dict(os.environ, YOLO_CONFIG_DIR=f"{work}/ultralytics",
               YOLO_OFFLINE="true", YOLO_VERBOSE="false", TQDM_DISABLE="1")
    t0, peak = time.perf_counter(), 0.
    p = subprocess.Popen([py, HERE / "yolo_sides.py", side, root, work],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env=env)
    while p.poll() is None:
        peak = max(peak, rss(p.pid))
        time.sleep(.02)
    out, err = p.communicate()
    total = time.perf_counter() - t0
    line = [x for x in out.splitlines() if x.startswith("RESULT ")]
    if p.returncode or not line:
        return dict(side=side, error=(err or out).strip().splitlines()[-1:])
    got = json.loads(line[0][7:])
    return dict(side=side, **got, total=total, peak_mb=peak)


def machine():
    "The machine in words."
    info = Path("/proc/cpuinfo").read_text()
    name = next((x.split(":", 1)[1].strip() for x in info.splitlines()
                 if x.startswith("model name")), "unknown CPU")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {ram:.0f} GB"


def summarise(runs):
    "Side -> median seconds, largest peak, counts."
    out = {}
    for r in runs:
        out.setdefault(r["side"], []).append(r)
    table = []
    for side, rs in out.items():
        good = [r for r in rs if "error" not in r]
        if not good:
            table.append(rs[0])
            continue
        row = {k: v for k, v in good[0].items() if k not in (
            "seconds", "total", "cpu", "peak_mb")}
        table.append(dict(
            row, runs=len(good),
            seconds=round(statistics.median(r["seconds"] for r in good), 3),
            cpu=round(statistics.median(r["cpu"] for r in good), 3),
            total=round(statistics.median(r["total"] for r in good), 3),
            peak_mb=round(max(r["peak_mb"] for r in good))))
    return table


def ratios(table):
    "The goals: ratio of seconds and of CPU seconds, what it should be."
    s = {r["side"]: r for r in table if "seconds" in r}
    goals = [("index faster than ultralytics' scan", "ultralytics", "index",
              ">=", 6), ("index over bare reading", "index", "bare", "<=", 6),
             ("index over bare reading of the labels alone", "index",
              "bare_labels", "<=", None),
             ("convert faster than globox", "globox", "convert", ">=", 8),
             ("convert faster than ultralytics' scan", "ultralytics",
              "convert", ">=", 3),
             ("convert over hotcoco", "convert", "hotcoco", "<=", 1.2),
             ("convert faster than supervision", "supervision", "convert",
              ">=", None),
             ("convert faster than a usual script", "script", "convert", ">=",
              None),
             ("audit without pixels over index", "audit", "index", "<=", 3),
             ("audit with pixels: share of decoding alone", "decode",
              "audit_pixels", ">=", .8)]
    out = []
    for text, a, b, sign, goal in goals:
        if a not in s or b not in s:
            continue
        q = round(s[a]["seconds"] / s[b]["seconds"], 2)
        met = None if goal is None else (q >= goal if sign == ">=" else
                                         q <= goal)
        out.append(dict(what=text, ratio=q,
                        cpu_ratio=round(s[a]["cpu"] / s[b]["cpu"], 2),
                        goal=goal and f"{sign} {goal}", met=met))
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--full", action="store_true", help="67,507 images")
    ap.add_argument("--sides", default="", help="only these, with commas")
    ap.add_argument("--no-save", action="store_true")
    a = ap.parse_args()
    os.environ.setdefault("CROWDLENS_OUT", str(TOP / "outputs"))
    work = Path(os.environ["CROWDLENS_OUT"]) / ".cache/bench"
    n, k = (67_507, 85) if a.full else (10_000, 85)
    root = make_set(work / f"yolo-{n}", n, k)
    order = ["bare", "bare_labels", "index", "ultralytics", "convert",
             "hotcoco", "bare", "index", "audit", "convert", "hotcoco",
             "ultralytics", "index", "audit", "convert", "bare", "reopen",
             "bare_labels", "reopen", "globox", "script", "supervision"]
    if a.full:
        order = ["bare", "index", "reopen", "convert", "bare", "index",
                 "reopen", "convert", "hotcoco", "audit"]
    else:
        order += ["decode", "audit_pixels"] * 2
    if a.sides:
        order = [s for s in order if s in a.sides.split(",")]
    py = peers_python() if set(order) & set(PEERS) else ""
    runs, load = [], 0.
    for side in order:
        data = root
        if side in ("decode", "audit_pixels"):
            data = make_set(work / "yolo-pixels", 800, 20, (1280, 720), 800, 1)
        load = max(load, os.getloadavg()[0])
        r = measure(py if side in PEERS else sys.executable, side, data,
                    work / "work")
        runs.append(r)
        print(f"{side:14}", r.get("error") or f"{r['seconds']:8.2f} s "
              f"{r['cpu']:8.2f} s CPU {r['peak_mb']:6.0f} MB", flush=True)
        if not a.no_save and not a.sides:
            save(runs, n, k, a.full, load)
    for g in ratios(summarise(runs)):
        print(f"{g['what']:48} {g['ratio']:8.2f} (CPU {g['cpu_ratio']:.2f})  "
              f"{g['goal'] or '':8}"
              f"{'' if g['met'] is None else 'met' if g['met'] else 'MISSED'}")


def save(runs, n, k, full, load):
    "Write what was measured so far."
    table = summarise(runs)
    path = HERE / "results" / f"yolo{'-full' if full else ''}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(
        part="yolo", images=n, boxes=n * k, machine=machine(),
        date=datetime.date.today().isoformat(), load=round(load, 1),
        python=sys.version.split()[0],
        command="python bench/yolo.py --full" if full else
        "make bench PART=yolo", table=table, goals=ratios(table)),
        indent=1) + "\n")


if __name__ == "__main__":
    main()
