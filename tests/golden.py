"""Compare crowdlens with recorded figures: `python tests/golden.py FOLDER`.

Runs every case (a JSON object with `kind`) of the folder and its subfolders.
A line a case: PASS or FAIL, its name, the largest error over its tolerance.
Checks live in tests/golden_*.py and register themselves by system and kind."""
import contextlib
import importlib
import json
import math
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
for p in (HERE.parent, HERE):
    if str(p) not in sys.path:
        sys.path.insert(0, str(p))

import goldenkit  # noqa: E402

for p in sorted(HERE.glob("golden_*.py")):
    importlib.import_module(p.stem)


def cases(folder):
    "(name, path, object or the reason why it cannot be read) of each case."
    folder = Path(folder)
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
    top = folder.parent if folder.is_file() else folder
    for p in paths:
        name = p.relative_to(top).with_suffix("").as_posix()
        try:
            data = json.loads(p.read_text(encoding="utf-8"))
        except (ValueError, OSError) as e:
            yield name, p, f"cannot be read: {e}"
            continue
        if isinstance(data, dict) and "kind" in data:
            yield name, p, data


def check(name, path, data):
    "Whether one case passes, and its line."
    if isinstance(data, str):
        return False, f"FAIL {name}  {data}"
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            top, what = goldenkit.score(path, data)
    except Exception as e:  # a check that dies is a failure, with its reason
        top, what = math.inf, f"{type(e).__name__}: {e}"
    what = " ".join(what.split())[:300]
    ok = top <= 1
    return ok, f"{'PASS' if ok else 'FAIL'} {name}  {top:.3g}  {what}"


def run(folder, only=None, out=print):
    "Check the cases of a folder; exit code 0 when all pass and there is one."
    good = bad = 0
    for name, path, data in cases(folder):
        if only is not None and (isinstance(data, str) or (data.get("system"), data["kind"]) not in only):
            continue
        ok, line = check(name, path, data)
        good, bad = good + ok, bad + (not ok)
        out(line)
    out(f"{good} passed, {bad} failed")
    return 0 if good and not bad else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/golden.py FOLDER")
    if not Path(sys.argv[1]).exists():
        sys.exit(f"no such folder: {sys.argv[1]}")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.exit(run(sys.argv[1], out=lambda line: print(line, flush=True)))
