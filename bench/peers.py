"""An environment of its own for the programs that a benchmark compares with."""
import subprocess
import venv
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TOP = HERE.parent


def python(name):
    "An interpreter that sees this environment's packages and the peers of requirements-NAME.txt."
    env = TOP / f".venv-bench-{name}"
    py, done, listed = env / "bin/python", env / ".done", HERE / f"requirements-{name}.txt"
    if not done.exists() or done.read_text() != listed.read_text():
        venv.create(env, with_pip=True)
        site = next((env / "lib").glob("python*")) / "site-packages"
        (site / "base.pth").write_text(f"{Path(np.__file__).parents[1]}\n{TOP}\n")
        subprocess.run([py, "-m", "pip", "install", "-qq", "--no-deps", "-r", listed], check=True)
        done.write_text(listed.read_text())
    return str(py)
