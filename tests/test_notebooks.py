"""Every notebook runs, and the checkout is what the notebooks say."""
import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
NBS = sorted(
    p.relative_to(TOP / "nbs")
    for p in (TOP / "nbs").rglob("*.ipynb")
    if not any(part[0] in "_." for part in p.relative_to(TOP / "nbs").parts)
)


def has_code(nb):
    return any(c["cell_type"] == "code" for c in json.loads((TOP / "nbs" / nb).read_text())["cells"])


@pytest.mark.parametrize("nb", filter(has_code, NBS), ids=str)  # pages of prose are run by test_guides
def test_runs(nb, tmp_path):
    "The notebook runs from top to bottom, slow lessons included."
    cmd = [str(Path(sys.executable).with_name("nbdev-test")), str(TOP / "nbs" / nb), "--n-workers", "0", "--flags", "slow"]
    env = os.environ | {"CROWDLENS_OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    got = subprocess.run(cmd, cwd=TOP, env=env, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout[-4000:] + got.stderr[-4000:]


def code_lines(src):
    "Lines of a cell without directives, decorators and signatures."
    src = "\n".join(l for l in src.split("\n") if not l.startswith(("#|", "@")))
    defs = [n for n in ast.walk(ast.parse(src)) if isinstance(n, ast.FunctionDef)]
    signatures = sum(max(n.body[0].lineno - n.lineno - 1, 0) for n in defs)
    return len(src.split("\n")) - signatures


@pytest.mark.parametrize("nb", NBS, ids=str)
def test_shape(nb):
    "Size, first cell, cell length and imports alone, as the house style says."
    path = TOP / "nbs" / nb
    assert path.stat().st_size <= 400_000
    cells = json.loads(path.read_text())["cells"]
    first = "".join(cells[0]["source"]).strip().split("\n")
    assert first[0].startswith("# ") and first[-1].startswith("> ") and len(first) == 3
    for c in cells:
        src = "".join(c["source"])
        if c["cell_type"] != "code":
            continue
        lines = src.split("\n")
        if src.startswith("#| export"):
            assert code_lines(src) <= 40, f"{nb}: an exported cell of {code_lines(src)} lines:\n{src[:300]}"
        assert max(map(len, lines)) <= 80, f"{nb}: too wide: {max(lines, key=len)}"
        for out in c["outputs"]:
            for data in out.get("data", {}).values():
                assert len("".join(data)) <= 165_000, f"{nb}: an output over 120 KB"


def test_readme_is_the_index_notebook():
    readme = runpy.run_path(str(TOP / "nbs" / "_site" / "readme.py"))["readme"]
    assert (TOP / "README.md").read_text() == readme(), "run `make readme`"


LAYERS = {"core": 0, "metrics": 1, "models": 1}
ABOVE = {"crowdlens.cli", "crowdlens.demo", "crowdlens.who_does_what"}


def layer(module):
    "Depth of a module: core, then metrics and models, then stages."
    parts = module.split(".")
    return LAYERS.get(parts[1], 2) if len(parts) > 1 else 0


def imported(path, me):
    "crowdlens modules that the file imports, relative imports resolved."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = me.split(".")[: -node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            names = [base] + [f"{base}.{a.name}" for a in node.names]
        else:
            continue
        for n in names:
            if n.startswith("crowdlens.") and (TOP / Path(*n.split(".")).with_suffix(".py")).exists():
                yield n


def upward(path, me):
    "Imports of `path` that do not go down."
    for n in imported(path, me):
        up = layer(n) > layer(me) or layer(n) == layer(me) == 2
        if up and not (me in ABOVE and n != me):
            yield f"{me} imports {n}"


def test_imports_go_down(tmp_path):
    "core imports core alone; models and metrics no stage; no stage a stage."
    bad, seen = [], 0
    for path in sorted((TOP / "crowdlens").rglob("*.py")):
        me = ".".join(path.relative_to(TOP).with_suffix("").parts)
        bad += upward(path, me)
        seen += len(list(imported(path, me)))
    assert not bad and seen > 20
    probe = tmp_path / "probe.py"  # the rule itself can fail
    probe.write_text("from ..audit import audit\nfrom . import files")
    if (TOP / "crowdlens" / "audit.py").exists():
        assert list(upward(probe, "crowdlens.core.probe")) == ["crowdlens.core.probe imports crowdlens.audit"]


def test_core_loads_no_torch():
    code = "import sys, crowdlens, crowdlens.core.boxes, crowdlens.core.yolo; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
