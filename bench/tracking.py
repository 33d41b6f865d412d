"""Speed of tracking figures beside the peers, on sequences of MOT17's size.

    make bench PART=tracking       7 sequences, 5,316 frames, about 21 people

People walk as in the built-in world; the tracker misses some, invents some
and switches some. Each side reads the same text files and gives HOTA, MOTA,
IDF1 and their parts, in a process of its own, in turns; the figures must be
the same. trackers' reader takes no file of ours, so it is given arrays that
our reader made, and that time is counted. motmetrics has no HOTA. Seconds of
the processor stand beside those of the clock, for machines that do other
things meanwhile; they hold the imports of a side, too."""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import peers

HERE = Path(__file__).resolve().parent
LENGTHS = (600, 1050, 837, 525, 654, 900, 750)      # MOT17's training set


def write(top, people=21):
    "Truth and a tracker's rows of seven sequences."
    from crowdlens.core.mot import mot_rows, save_mot
    from crowdlens.core.world import World
    n_gt = 0
    for k, n in enumerate(LENGTHS):
        rng = np.random.default_rng(k)
        rows = []
        for _, t in World("court", 20_000 + k, people, (64, 40), 25).frames(n):
            rows += [(t.index, i, *(b * 30)) for i, b in zip(t.ids, t.boxes_xyxy)]
        r = np.array(rows)
        box = np.c_[r[:, 2:4], r[:, 4:] - r[:, 2:4]]
        save_mot(top / f"gt/s{k}/gt/gt.txt", mot_rows(r[:, 0], r[:, 1] + 1, box, 1, 1), "gt")
        n_gt += len(r)
        part = (r[:, 0] // rng.integers(60, 200)).astype(int)
        ids = r[:, 1] + 1 + 1000 * part * (rng.random(1000)[r[:, 1].astype(int)] < .3)
        seen = rng.random(len(r)) > .12
        near = box + rng.normal(0, .04, box.shape) * np.tile(box[:, 2:], 2)
        false = rng.random(len(r)) < .05
        f, i, b = (np.r_[a[seen], c[false]] for a, c in ((r[:, 0], r[:, 0]), (ids, 10**6 + np.arange(len(r))),
                                                       (near, near + [200, 0, 0, 0])))
        b[:, 2:] = np.maximum(b[:, 2:], 1)
        save_mot(top / f"res/s{k}.txt", mot_rows(f, i, b))
    return n_gt


def ours(top):
    from crowdlens.metrics import tracking
    t0 = time.perf_counter()
    got = tracking.evaluate(top / "gt", top / "res")
    return got, time.perf_counter() - t0


def roboflow(top):
    from trackers.eval import compute_clear_metrics, compute_hota_metrics, compute_identity_metrics

    from crowdlens.core.mot import read_mot
    from crowdlens.metrics import tracking as T
    t0, n, out = time.perf_counter(), 0, dict(IDSW=0)
    for k in range(len(LENGTHS)):
        p = T.pair(read_mot(top / f"gt/s{k}/gt/gt.txt"), read_mot(top / f"res/s{k}.txt"))
        cut = lambda v, at: [v[a:b] for a, b in zip(at, at[1:])]
        g, t = cut(p.gt_id, p.gt_at), cut(p.tr_id, p.tr_at)
        s = [T.iou_table(a, b) for a, b in zip(cut(p.gt, p.gt_at), cut(p.tr, p.tr_at))]
        f = {**compute_hota_metrics(g, t, s), **compute_clear_metrics(g, t, s), **compute_identity_metrics(g, t, s)}
        out |= {f"s{k}/{m}": float(f[m]) for m in ("HOTA", "MOTA", "IDF1")}
        out["IDSW"] += int(f["IDSW"])
    return out, time.perf_counter() - t0


def trackeval(top):
    import trackeval as te
    if not hasattr(np, "float"):
        np.float, np.int, np.bool = float, int, bool
    t0 = time.perf_counter()
    cfg = te.datasets.MotChallenge2DBox.get_default_dataset_config() | dict(
        GT_FOLDER=str(top / "gt"), TRACKERS_FOLDER=str(top / "te"), TRACKERS_TO_EVAL=["x"], TRACKER_SUB_FOLDER="",
        SKIP_SPLIT_FOL=True, SEQ_INFO={f"s{k}": n for k, n in enumerate(LENGTHS)}, PRINT_CONFIG=False,
        GT_LOC_FORMAT="{gt_folder}/{seq}/gt/gt.txt")
    (top / "te").mkdir(exist_ok=True)
    if not (top / "te/x").exists():
        (top / "te/x").symlink_to(top / "res")
    data = te.datasets.MotChallenge2DBox(cfg)
    ms, out = [te.metrics.HOTA(), te.metrics.CLEAR(dict(PRINT_CONFIG=False)),
               te.metrics.Identity(dict(PRINT_CONFIG=False))], {}
    for k in range(len(LENGTHS)):
        d = data.get_preprocessed_seq_data(data.get_raw_seq_data("x", f"s{k}"), "pedestrian")
        f = {}
        for m in ms:
            f |= m.eval_sequence(d)
        out |= {f"s{k}/HOTA": float(np.mean(f["HOTA"])), f"s{k}/MOTA": float(f["MOTA"]), f"s{k}/IDF1": float(f["IDF1"])}
    return out, time.perf_counter() - t0


def motmetrics(top):
    "CLEAR and identity figures; it has no HOTA."
    np.asfarray = lambda a, dtype=float: np.asarray(a, dtype)
    import motmetrics as mm
    t0, accs = time.perf_counter(), []
    for k in range(len(LENGTHS)):
        gt = mm.io.loadtxt(top / f"gt/s{k}/gt/gt.txt", fmt="mot16", min_confidence=1)
        accs.append(mm.utils.compare_to_groundtruth(gt, mm.io.loadtxt(top / f"res/s{k}.txt", fmt="mot16"), "iou",
                                                    distth=.5))
    f = mm.metrics.create().compute_many(
        accs, metrics=["mota", "idf1", "num_switches"], names=[f"s{k}" for k in range(len(accs))])
    out = {f"s{k}/{n}": float(f.loc[f"s{k}", m]) for k in range(len(accs)) for n, m in (("MOTA", "mota"), ("IDF1", "idf1"))}
    return out | dict(IDSW=int(f["num_switches"].sum())), time.perf_counter() - t0


SIDES = dict(ours=ours, roboflow=roboflow, trackeval=trackeval, motmetrics=motmetrics)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--side", nargs=2)
    ap.add_argument("--turns", type=int, default=3)
    a = ap.parse_args()
    if a.side:
        t0 = time.process_time()
        figs, sec = SIDES[a.side[0]](Path(a.side[1]))
        print(json.dumps(dict(wall=sec, cpu=time.process_time() - t0, figures=figs)))
        return
    py, got = peers.python("tracking"), {n: [] for n in SIDES}
    with tempfile.TemporaryDirectory() as tmp:
        boxes = write(Path(tmp))
        ours(Path(tmp))                                     # compiles once
        for _ in range(a.turns):
            for n in list(got):
                r = subprocess.run([py, __file__, "--side", n, tmp], capture_output=True, text=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
                if r.returncode:
                    print(n, "does not run here:", r.stderr.strip().splitlines()[-1], flush=True)
                    del got[n]
                    continue
                got[n].append(json.loads(r.stdout.splitlines()[-1]))
                print(n, round(got[n][-1]["wall"], 2), "s", flush=True)
    mine, apart = got["ours"][0]["figures"], {}
    for n, rs in got.items():
        apart[n] = max(abs(mine[k] - v) for k, v in rs[0]["figures"].items())
        # motmetrics breaks ties between equal overlaps its own way: a switch more or less in some sequence
        assert apart[n] < (1e-6 if n != "motmetrics" else 10), f"{n}: figures differ by {apart[n]}"
    out = dict(date=datetime.date.today().isoformat(), cpus=os.cpu_count(), machine=platform.machine(),
               frames=sum(LENGTHS), boxes=boxes, command="make bench PART=tracking",
               wall={n: round(statistics.median(r["wall"] for r in rs), 2) for n, rs in got.items()},
               cpu={n: round(statistics.median(r["cpu"] for r in rs), 2) for n, rs in got.items()},
               largest_difference=apart, load=round(os.getloadavg()[0], 1))
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/tracking.json").write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
