"""The GPU's benchmark on a machine that has none, and few libraries."""
import json
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]

BARE = """
import importlib.abc, runpy, sys
GONE = "fastcore orjson av hotcoco albumentations supervision pydantic ruamel matplotlib".split()
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in GONE: return None
        for f in sys.meta_path:  # as if these were not installed: the script's own stand-ins are asked
            if type(f).__name__ == "StandIns": return f.find_spec(name, path, target)
        raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Gone())
sys.argv = ["bench/gpu.py", "--tiny", "--to", sys.argv[1]]
runpy.run_path("bench/gpu.py", run_name="__main__")
"""


def test_every_part_runs_small_with_few_libraries(tmp_path):
    to = tmp_path / "gpu.json"
    got = subprocess.run([sys.executable, "-c", BARE, to], cwd=TOP, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-3000:]
    out = json.loads(to.read_text())
    assert {r["stage"] for r in out["rows"]} == {"03", "04", "05", "06"}
    assert not [r for r in out["rows"] if "left_out" in r], out["rows"]
    assert all(r["a_second"] > 0 for r in out["rows"]) and out["tiny"]
