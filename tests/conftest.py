"""Shared fixtures: the folder of golden figures and real data, and a rule
that turns its absence into a visible skip and a skip in its presence into a
failure."""
import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("CROWDLENS_SHARED", HERE.parents[1] / "shared"))



@pytest.fixture(scope="session")
def shared():
    "The folder with golden/ and realdata/; the test skips where it is absent."
    if not (SHARED / "realdata").is_dir():
        pytest.skip(f"no {SHARED}: real data and golden figures are absent")
    return SHARED


@pytest.fixture(autouse=True)
def _fresh_out(tmp_path, monkeypatch):
    "Every test writes its runs into a folder of its own."
    monkeypatch.setenv("CROWDLENS_OUT", str(tmp_path / "out"))


@pytest.fixture
def trackio_dir(tmp_path, monkeypatch):
    "Trackio writes into this folder."
    import trackio.sqlite_storage as ts
    import trackio.utils as tu

    folder = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    for m in (ts, tu):
        if hasattr(m, "TRACKIO_DIR"):
            monkeypatch.setattr(m, "TRACKIO_DIR", folder)
    return folder


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    uses_shared = "shared" in getattr(item, "fixturenames", ())
    if report.skipped and uses_shared and (SHARED / "realdata").is_dir():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped although {SHARED} is there"
