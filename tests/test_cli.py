"""The command line, as a person meets it: exit codes, messages, what a run
leaves behind, and the wheel."""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from crowdlens import cli
from crowdlens.core import config, runs
from crowdlens.core.files import read_json

TOP = Path(__file__).resolve().parents[1]
EXE = Path(sys.executable).with_name("crowdlens")


def call(*argv, cwd=None, out=None, exe=EXE, **env):
    "Exit code, stdout and stderr of the console script."
    env = os.environ | ({"CROWDLENS_OUT": str(out)} if out else {}) | env
    got = subprocess.run([exe, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True)
    return got.returncode, got.stdout, got.stderr


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "Stage 02's smoke run, from a folder outside the project."
    out, cwd = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("elsewhere")
    rc, text, err = call("run", "02_yolo2coco", "-f", "smoke", cwd=cwd, out=out)
    assert rc == 0, text + err
    return out, text, err


def test_wrong_type_is_one_clear_line():
    rc, _, err = call("run", "01_audit", "-p", "seed=two")
    assert rc == 2 and err.startswith("seed='two': should be a valid integer") and err.count("\n") == 1


def test_unknown_name_gets_the_nearest():
    rc, _, err = call("run", "01_audit", "-p", "rot=/data")
    assert rc == 2 and "no parameter 'rot'" in err and "did you mean 'root'" in err


def test_unknown_stage_and_profile():
    assert "there are: 01_audit" in call("run", "03_nothing")[2]
    rc, _, err = call("run", "01_audit", "-f", "enormous")
    assert rc == 2 and "has no profile 'enormous'" in err and "smoke" in err


def test_run_leaves_what_design_promises(smoke):
    out, text, err = smoke
    folder = out / "02_yolo2coco" / "smoke"
    for f in ("config.json", "metrics.json", "log.txt", "notebook.ipynb", "report.html"):
        assert (folder / f).stat().st_size > 0, f
    assert "cells: 100%" in err  # progress was shown
    rec = read_json(folder / "config.json")
    assert rec["starts"][0]["versions"]["numpy"] and rec["starts"][0]["device"]
    nb = nbformat.read(folder / "notebook.ipynb", 4)
    assert not [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert [c for c in nb.cells if "injected-parameters" in c.metadata.get("tags", [])]


def test_report_is_self_contained(smoke):
    html = (smoke[0] / "02_yolo2coco" / "smoke" / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:|//|(?!data:)[\w./-]+\.(?:js|css|png|jpg))""", html)


def test_finished_run_is_not_started_again(smoke):
    rc, text, err = call("run", "02_yolo2coco", "-f", "smoke", out=smoke[0])
    assert rc == 0 and "finished before" in text and "cells:" not in err


def test_other_identity_is_refused_with_the_fields(smoke):
    rc, _, err = call("run", "02_yolo2coco", "-f", "smoke", "-p", "seed=5", out=smoke[0])
    assert rc == 2 and re.search(r"seed: \d+ there, 5 now", err) and "--name" in err


def test_second_process_of_the_same_name_refuses(smoke, tmp_path):
    folder = tmp_path / "02_yolo2coco" / "busy"
    folder.mkdir(parents=True)
    held = runs.lock(folder, ".batch.lock")
    rc, _, err = call("run", "02_yolo2coco", "-f", "smoke", "--name", "busy", out=tmp_path)
    held.release()
    assert rc == 2 and "another process is in this run" in err


def test_failing_cell_exits_1_with_its_error(tmp_path, monkeypatch):
    "A notebook whose cell raises: the message, the code and the saved copy."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1\nx / 0")])
    src = tmp_path / "n.ipynb"
    nbformat.write(nb, src)
    with pytest.raises(cli.CellFailed, match="ZeroDivisionError: division by zero"):
        cli._papermill(src, tmp_path / "out.ipynb", {})
    assert "ZeroDivisionError" in (tmp_path / "out.ipynb").read_text()
    monkeypatch.setattr(cli, "app", lambda **k: (_ for _ in ()).throw(cli.CellFailed("cell 1 failed")))
    with pytest.raises(SystemExit) as e:
        cli.main([])
    assert e.value.code == 1


def test_killed_kernel_is_reported(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os; os.kill(os.getpid(), 9)")])
    nbformat.write(nb, tmp_path / "n.ipynb")
    with pytest.raises(cli.CellFailed, match="DeadKernelError"):
        cli._papermill(tmp_path / "n.ipynb", tmp_path / "out.ipynb", {})


def test_missing_root_stops_with_2_and_nothing_half_written(tmp_path):
    for stage in ("01_audit", "02_yolo2coco"):
        rc, _, err = call("run", stage, "-p", "root=/no/such/set", out=tmp_path)
        assert rc == 2 and "/no/such/set" in err
        assert not list((tmp_path / stage).rglob("*.json*")) or not (tmp_path / stage / "run" / "metrics.json").exists()


def test_parameters_cell_has_the_config_names():
    for stage, nb in cli.stages().items():
        cls = cli.module(stage).Config
        cell = config.cell_values(nb)
        names = {d["name"] for d in config.describe(cls)}
        assert set(cell) <= names, stage
        config.make(cls, cell)
        for profile in runs.profiles(stage):
            config.make(cls, runs.settings(stage, cls, profile))


def test_as_a_module_it_writes_the_same_folder(tmp_path):
    cmd = [sys.executable, "-m", "crowdlens.yolo2coco", "-f", "smoke", "--out", str(tmp_path)]
    subprocess.run(cmd, check=True, capture_output=True)
    folder = tmp_path / "02_yolo2coco" / "smoke"
    assert (folder / "report.html").exists() and not (folder / "notebook.ipynb").exists()


def test_check_says_what_it_found():
    rc, text, _ = call("check")
    assert rc == 0 and re.search(r"ok +numpy +\d", text) and "GB free" in text


def test_wheel_works_in_any_folder(tmp_path):
    "Built, installed beside the packages that are here, run in an empty folder."
    py = sys.executable
    wheels = tmp_path / "wheels"
    src = tmp_path / "src"
    subprocess.run(["git", "-C", TOP, "checkout-index", "-a", f"--prefix={src}/"], check=True)
    build = [py, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, src]
    subprocess.run(build, check=True)
    subprocess.run([py, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = next((tmp_path / "env" / "lib").glob("python3*/site-packages"))
    here = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "here.pth").write_text(here + "\n")
    whl = next(wheels.glob("*.whl"))
    env_py = tmp_path / "env" / "bin" / "python"
    subprocess.run([py, "-m", "pip", "--python", env_py, "install", "-q", "--no-deps", whl], check=True)
    exe, cwd = tmp_path / "env" / "bin" / "crowdlens", tmp_path / "empty"
    cwd.mkdir()
    env = {"CROWDLENS_OUT": "", "PYTHONPATH": ""}
    rc, text, err = call("stages", cwd=cwd, exe=exe, **env)
    assert rc == 0 and "02_yolo2coco" in text, err
    rc, text, err = call("run", "02_yolo2coco", "-f", "smoke", cwd=cwd, exe=exe, **env)
    assert rc == 0, text + err
    assert (cwd / "outputs" / "02_yolo2coco" / "smoke" / "report.html").exists()
    code = "import crowdlens.cli as c; print(c.__file__)"
    where = subprocess.run([env_py, "-c", code], cwd=cwd, capture_output=True, text=True, env=os.environ | env)
    assert str(tmp_path / "env") in where.stdout
