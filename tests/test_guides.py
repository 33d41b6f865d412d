"""The pages for newcomers: their commands are run as they stand, on the
built-in world written in the layout that the page shows; every command of the
docs is known to the parser; every name of the package that they mention is
there; what they say of errors is what is said."""
import dataclasses
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from crowdlens import cli
from crowdlens.core import action_sets, config, files, runs, worldfiles
from crowdlens.core.ava import read_ava, read_labelmap
from crowdlens.core.mot import mot_rows, save_mot
from crowdlens.core.world import World

TOP = Path(__file__).resolve().parents[1]
PAGES = sorted((TOP / "nbs").rglob("*.ipynb"))
HOWTO = ("crowd_detector", "fine_tuning", "fisheye", "volleyball", "actions")


def text(path):
    "The prose of a notebook."
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def blocks(md):
    "Command lines of the shell blocks of a text, continued lines joined."
    for block in re.findall(r"^```sh\n(.*?)^```", md, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(?:[A-Z_]+=\S* )*(?:crowdlens|torchrun|python -m crowdlens)", line):
                yield shlex.split(line, comments=True)


def first_part(name):
    return text(TOP / "nbs" / "guides" / f"{name}.ipynb").split("## In earnest")[0]


def direct(stage, values):
    "A stage's module in this process; its notebook's lessons are a test of their own."
    m = cli.module(stage)
    return m.run(m.Config(**values | dict(out=str(files.out_dir(values["out"])))))


def follow(name, here, monkeypatch):
    "Run a page's commands in the folder `here`, and look for what it promises."
    monkeypatch.chdir(here)
    monkeypatch.setenv("CROWDLENS_OUT", str(here / "outputs"))
    monkeypatch.setattr(cli, "execute", direct)
    done = list(blocks(first_part(name)))
    assert len(done) > 1
    for words in done:
        assert words[0] == "crowdlens", words
        try:
            cli.main(words[1:])
        except SystemExit as e:
            assert not e.code, " ".join(words)
    promised = set(re.findall(r"`(outputs/[^`]+)`", first_part(name)))
    lost = [p for p in promised if not (here / p).exists()]
    assert len(promised) > 3 and not lost, lost


@pytest.fixture(scope="module")
def crowds(tmp_path_factory):
    to = tmp_path_factory.mktemp("crowds") / "crowds"
    worldfiles.write_yolo(to, "court", train=8, val=4, size=(320, 192))
    return to


def test_crowd_detector(crowds, tmp_path, monkeypatch):
    shutil.copytree(crowds, tmp_path / "crowds")
    follow("crowd_detector", tmp_path, monkeypatch)


def test_fine_tuning(crowds, tmp_path, monkeypatch):
    import torch

    from test_checkpoints import lightning, resnet_detr
    shutil.copytree(crowds, tmp_path / "crowds")
    ck = "lightning_logs/version_0/checkpoints/last.ckpt"
    for p in (ck, "configs/default.yaml"):
        (tmp_path / p).parent.mkdir(parents=True)
    torch.manual_seed(0)
    lightning(tmp_path / ck, resnet_detr("resnet18", num_labels=2, num_queries=20))
    (tmp_path / "configs/default.yaml").write_text(
        f"train:\n  checkpoint_path: {ck}\n  freeze_backbone: true\n  unfreeze_backbone_at_epoch: 1\n"
        "  epochs: 2\n  batch_size: 4\n  learning_rate: 0.0001\n  weight_decay: 0.0001\n  num_workers: 0\n")
    follow("fine_tuning", tmp_path, monkeypatch)
    log = (tmp_path / "outputs/03_detr_dinov3/thawed/log.txt").read_text()
    assert "leave the backbone frozen" in log


def test_fisheye(tmp_path, monkeypatch):
    worldfiles.write_coco(tmp_path / "dataset", "street", train=8, val=4, size=(320, 192))
    follow("fisheye", tmp_path, monkeypatch)
    before = json.loads((tmp_path / "outputs/04_dfine_fisheye/judged/metrics.json").read_text())
    assert {"f1", "f1_challenge", "f1_challenge_best", "precision", "recall"} <= set(before)


def test_volleyball(tmp_path, monkeypatch):
    top = tmp_path / "volleyball"
    worldfiles.write_mot(top / "train/game1", World("court", 5, 5, (160, 96), 10), 14)
    (top / "test").mkdir()
    worldfiles.write_world_film(top / "test/beach1.mp4", World("court", 10_005, 4, (160, 96), 10), 11)
    shutil.copytree(runs.shipped("court"), tmp_path / "weights/detector")
    follow("volleyball", tmp_path, monkeypatch)


def plays(top, here):
    "An AVA folder as the page's layout has it: a clip a second, boxes and JSON."
    ids = read_labelmap(top / "annotations/ava_action_list.pbtxt")
    for split in ("train", "val"):
        rows = read_ava(top / f"annotations/ava_{split}.csv")
        movies = (top / f"annotations/movies_{split}.txt").read_text().split()
        cut = action_sets.cut_films([top / f"movies/{m}.mp4" for m in movies], here / "cut", short=96, keyframes=False)
        (here / f"clips/{split}").mkdir(parents=True)
        for m in movies:
            shutil.move(here / "cut/clips" / m, here / f"clips/{split}" / m)
        doc = dict(images=[], annotations=[], categories=[dict(id=k, name=v) for k, v in ids.items()])
        found, number = [], {}
        for m, s in dict.fromkeys(rows.keys()):
            if s in cut[m]:
                number[m, s] = len(number)
                doc["images"].append(dict(id=number[m, s], file_name=f"{m}/{int(s)}.jpg", width=160, height=96))
        for (m, s), b, a in zip(rows.keys(), rows.boxes_xyxy_rel * [160, 96, 160, 96], rows.action.tolist()):
            if (m, s) not in number:
                continue
            x, y, w, h = (float(v) for v in (*b[:2], *(b[2:] - b[:2])))
            row = dict(image_id=number[m, s], category_id=a, bbox=[x, y, w, h])
            doc["annotations"].append(row | dict(id=len(doc["annotations"]), area=w * h, iscrowd=0))
            found.append(row | dict(category_id=1, score=0.93))
        files.write_json(here / f"annotations/{split}.json", doc)
        files.write_json(here / f"boxes/{split}_person_bbox.json", found)


def test_actions(tmp_path, monkeypatch):
    small = dict(people=(3, 4), size=(160, 96), workers=1)
    plays(worldfiles.write_ava(tmp_path / "ava", train=1, val=1, seconds=5, **small), tmp_path / "plays")
    world, rows = World("court", 20_003, 3, (160, 96)), []

    def images():
        for im, t in world.frames(51):
            wh = t.boxes_xyxy[:, 2:] - t.boxes_xyxy[:, :2]
            rows.extend((t.index, i, *b, *s, 0.9) for i, b, s in zip(t.ids, t.boxes_xyxy[:, :2], wh))
            yield im
    from crowdlens.core.frames import write_film
    write_film(tmp_path / "match.mp4", images(), 25)
    r = np.array(rows, float)
    save_mot(tmp_path / "match.txt", mot_rows(r[:, 0].astype(int), r[:, 1].astype(int), r[:, 2:6], r[:, 6]))
    follow("actions", tmp_path, monkeypatch)


# -- every command of the docs -------------------------------------------------

FILES = {"--from", "--file", "-f"}


def check(words):
    "Raise where the parser, or a stage's settings, do not know a command."
    if words[0] == "torchrun" or words[:2] == ["python", "-m"]:
        at = words.index("-m") + 1
        m, rest = importlib.import_module(words[at]), iter(words[at + 1:])
        vals = {"-p": []}
        for w in rest:
            assert w in ("-f", "-p", "--name", "--out"), w
            v = next(rest)
            vals[w] = [*vals["-p"], v] if w == "-p" else v
        if m.__name__.startswith("crowdlens.core"):
            return
        return runs.settings(m.STAGE, m.Config, vals.get("-f", ""), vals["-p"])
    from typer.main import get_command
    cmd = get_command(cli.app).commands[words[1]]
    got = cmd.make_context(words[1], list(words[2:])).params
    if words[1] in ("run", "submit"):
        stage = cli.find_stage(got["stage"])
        file = got["file"] if got["file"] in ("", *runs.profiles(stage)) or got["file"].endswith((".yaml", ".yml")) else 0
        assert file != 0, f"no profile {got['file']}"
        if file.endswith((".yaml", ".yml")):
            file = ""
        cls = cli.module(stage).Config
        if got["start"]:
            assert hasattr(cli.module(stage), "from_guide")
        known(cls, got["param"], runs.profile_values(stage, file) if file else {})
    elif words[1] in ("predict", "evaluate"):
        known(cli.module(cli.find_stage("03")).Config, got["param"], {})


def known(cls, pairs, base):
    "Names and types of `pairs`; files need not be there."
    vals = base | config.parse(cls, pairs)
    names = {f.name for f in dataclasses.fields(cls)}
    assert set(vals) <= names, set(vals) - names
    hints = __import__("typing").get_type_hints(cls)
    for k, v in vals.items():
        config._to(hints[k], v, k)


def inline(md):
    "Commands that stand in the prose or in tables, between backticks."
    for code in re.findall(r"(?<!`)`((?:crowdlens|torchrun|python -m crowdlens)[^`]*)`", md):
        words = shlex.split(code.replace("\\|", "|"))
        if len(words) > 2 and "…" not in code:
            yield words


def test_commands_of_the_docs_parse():
    "Shell blocks and commands in the prose of every notebook, README among them."
    seen, lost = 0, []
    for page in PAGES:
        md = text(page)
        for words in [*blocks(md), *inline(md)]:
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            seen += 1
            try:
                check(words)
            except BaseException as e:
                lost.append(f"{page.stem}: {' '.join(words)}: {e!r}")
    assert seen > 80 and not lost, "\n".join(lost)


def test_the_check_of_commands_can_fail():
    for line in ("crowdlens run 03_detr_dinov3 -p epoch=3", "crowdlens run 09_x", "crowdlens fly", "crowdlens run 03 --fast",
                 "crowdlens run 03_detr_dinov3 -f huge", "crowdlens run 03_detr_dinov3 -p epochs=many",
                 "torchrun -m crowdlens.detr_dinov3 -p epoch=3"):
        with pytest.raises(BaseException):
            check(line.split())


def test_names_of_the_package_are_there():
    "Dotted names in the pages for newcomers."
    seen = 0
    for page in (TOP / "nbs/guides").glob("*.ipynb"):
        for name in re.findall(r"`(crowdlens(?:\.\w+)+)(?:\([^`]*\))?`", text(page)):
            parts = name.split(".")
            for k in range(len(parts), 0, -1):
                try:
                    o = importlib.import_module(".".join(parts[:k]))
                    break
                except ModuleNotFoundError:
                    continue
            for a in parts[k:]:
                o = getattr(o, a)
            seen += 1
    assert seen > 3


# -- what the pages say of errors ----------------------------------------------

def quoted(page):
    return re.findall(r'`"([^"]+)"`', text(TOP / f"nbs/guides/{page}.ipynb"))


def test_problems_are_quoted_from_the_code():
    "Each message on the page of problems is one that the package can print."
    code = "\n".join(p.read_text() for p in (TOP / "crowdlens").rglob("*.py") if p.name != "_modidx.py")
    code = re.sub(r'"\s*(?:\\\n\s*)?\n?\s*f?"', "", code)  # texts that go on in the next line
    code = re.sub(r"\{[^{}]*\}", "…", code)
    said = quoted("problems")
    lost = [m for m in said if not all(part.strip() in code for part in m.split("…"))]
    assert len(said) > 35 and not lost, lost


def test_problems_are_met_as_the_page_says(tmp_path):
    from crowdlens.core.det_db import read_det_db
    from crowdlens.core.detection_data import open_data
    from crowdlens.core.track_data import find_sequences
    from crowdlens.detr_dinov3 import Config as Detr
    from crowdlens.models import checkpoints, track_steps
    db = tmp_path / "db.json"
    db.write_text('{"a/img1/00000001.txt": ["1,1,5,5,7\\n"]}')
    seq = type("S", (), dict(name="a", keys=lambda self: ["a/img1/00000001.txt"]))()
    busy = config.Config(out=str(tmp_path / "o"), name="busy")

    def twice():
        with runs.Run("00_toy", busy), runs.Run("00_toy", busy):
            pass

    def other():
        with runs.Run("00_toy", config.Config(out=str(tmp_path / "o"), name="x")):
            pass
        with runs.Run("00_toy", config.Config(out=str(tmp_path / "o"), name="x", seed=1)):
            pass
    met = {
        "no such folder or list": lambda: find_sequences(tmp_path / "nowhere"),
        "no sequence here": lambda: find_sequences(tmp_path),
        "no such checkpoint": lambda: checkpoints.open(tmp_path / "none.pth"),
        "is outside 0..1": lambda: read_det_db(db),
        "have no key in the det_db": lambda: track_steps.whole(seq, {}),
        "no … of … found": lambda: action_sets.find_files(tmp_path, "train"),
        "leaves nothing to unfreeze": lambda: Detr(data="x", freeze_backbone=False, unfreeze_backbone_at_epoch=5),
        "is no multiple of device_batch": lambda: Detr(data="x", batch_size=8, device_batch=3),
        "another process is in this run": twice,
        "this name holds another run": other,
        "no parameter …": lambda: config.make(Detr, dict(epoch=3)),
    }
    page = text(TOP / "nbs/guides/problems.ipynb")
    for said, do in met.items():
        assert said in page, said
        with pytest.raises(files.InputError, match=".*".join(map(re.escape, said.split("…")))):
            do()
    with pytest.raises(files.InputError, match="no such data"):
        open_data(str(tmp_path / "nowhere"))
