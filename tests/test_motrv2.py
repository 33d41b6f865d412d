"""MOTRv2: what a notebook should not show: hostile files, odd input, memory, gradients, a cut tracking run."""
import re

import golden_motrv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdlens.core.files import InputError
from crowdlens.models import motrv2, motrv2_clips, motrv2_loss, motrv2_training
from crowdlens.models.motrv2 import SMALL, MOTRv2
from crowdlens.models.motrv2_queries import fresh
from crowdlens.models.motrv2_transformer import sample_points


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    m = MOTRv2(SMALL)
    torch.nn.init.normal_(m.class_embed[-1].weight, std=.3)
    return m


def clip(frames=3, size=(96, 160), seed=0, proposals=4, people=3):
    rng = np.random.default_rng(seed)
    box = lambda n: np.c_[rng.uniform(.2, .8, (n, 2)), rng.uniform(.05, .3, (n, 2))]
    boxes = box(people)
    return motrv2_loss.Clip(
        [rng.integers(0, 255, (*size, 3), np.uint8) for _ in range(frames)],
        [np.c_[box(proposals), rng.random(proposals)] for _ in range(frames)],
        [boxes] * frames, [np.arange(people)] * frames)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_both_ways_to_read_points_agree(seed, queries, levels):
    "The quick sum of inference is grid_sample's, also outside the picture."
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(1, 7, 2).tolist()) for _ in range(levels)]
    n = sum(h * w for h, w in shapes)
    t = lambda *s: torch.tensor(rng.normal(.5, .7, s), dtype=torch.float32)
    args = t(1, n, 2, 4), shapes, t(1, queries, 2, levels, 3, 2), t(1, queries, 2, levels, 3)
    usual = sample_points(*args)
    with torch.inference_mode():
        quick = sample_points(*args)
    assert torch.allclose(quick, usual, atol=1e-5)


def test_points_that_are_not_numbers_read_nothing():
    at = torch.full((1, 1, 1, 1, 1, 2), float("nan"))
    with torch.inference_mode():
        got = sample_points(torch.ones(1, 4, 1, 8), [(2, 2)], at, torch.ones(1, 1, 1, 1, 1))
    assert not got.any()


def test_embed_only_gradient_is_that_of_full_training(net):
    "To the last bit, denoised queries and carried tracks included."
    got = []
    for only in (True, False):
        motrv2_training.choose(net, only)
        net.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        motrv2_loss.clip_loss(net, clip(4), .05, embed_only=only).total.backward()
        got.append(net.yolox_embed.weight.grad.clone())
    assert torch.equal(*got) and got[0].abs().sum() > 0


def test_tuning_leaves_all_else(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    me = motrv2_training.Tuner(net, 1e-2, accumulate=2)
    for i in range(3):
        me.learn(clip(seed=i), i == 2)
    after = net.state_dict()
    assert [k for k in after if not torch.equal(after[k], before[k])] == ["yolox_embed.weight"]


def test_frame_of_a_clip_without_people_or_proposals(net):
    c = clip()
    c.boxes[1], c.ids[1], c.proposals[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5)
    c.proposals[2] = torch.zeros(0, 5)
    got = motrv2_loss.clip_loss(net, c, .05)
    assert torch.isfinite(got.total) and got.samples == 6


def test_a_box_without_area_gives_no_nan(net):
    c = clip()
    c.boxes[1] = c.boxes[1].clone()
    c.boxes[1][0, 2:] = 0
    assert torch.isfinite(motrv2_loss.clip_loss(net, c, .05).total)


def test_tracking_streams(net):
    "A frame is read only when its tracks are wanted; sizes may change."
    read = []

    def frames():
        for i in range(4):
            read.append(i)
            yield np.full((96 + 16 * i, 160, 3), 40 * i, np.uint8)
    tracks = net.eval().track(frames(), ([[.5, .5, .1, .3, .9]] for _ in range(4)))
    next(tracks)
    assert read == [0]
    assert len(list(tracks)) == 3


@pytest.mark.parametrize("bad,why", [
    ([[.5, .5, .1, .3, float("nan")]], "NaN"), ([[.5, .5, .1, .3, 7.]], "outside 0..1"),
    ([[320, 190, 40, 90, .5]], "pixels"), ([[.5, .5, .1, .3]], "not \\(n,5\\)")])
def test_bad_proposals(net, bad, why):
    with pytest.raises(InputError, match=why):
        list(net.track([np.zeros((64, 96, 3), np.uint8)], [bad]))


def states(net):
    s = dict(motrv2.twice(motrv2.once(net)))
    yield "of another shape", s | {"position.weight": torch.zeros(10, 5)}
    yield "missing", {k: v for k, v in s.items() if not k.startswith("track_embed")}
    yield "of 91 classes", s | {"class_embed.0.bias": torch.zeros(91)}
    yield "no MOTRv2 weights", {"head": torch.zeros(3)}


def test_weights_that_do_not_fit(net):
    for why, s in states(net):
        with pytest.raises(InputError, match=why):
            motrv2.load(s)


def test_another_number_of_layers_and_queries_opens(tmp_path):
    "They are read from the shapes, also through the door that opens every kind."
    from dataclasses import replace

    from crowdlens.models import checkpoints
    torch.manual_seed(1)
    m = MOTRv2(replace(SMALL, encoder_layers=2, decoder_layers=2, learned=4))
    torch.save(dict(model=m.state_dict()), tmp_path / "m.pth")
    got = motrv2.load(tmp_path / "m.pth")
    assert got.design == m.design
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), m.state_dict().values()))
    opened = checkpoints.open(tmp_path / "m.pth")
    assert opened.kind == "tracker"


@pytest.mark.parametrize("raw", [b"not weights at all", b"\x80\x04cos\nsystem\n(S'touch HACKED'\ntR."])
def test_hostile_files(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(raw)
    with pytest.raises(InputError):
        motrv2.load(tmp_path / "x.pth")
    assert not (tmp_path / "HACKED").exists()


def test_a_checkpoint_with_its_arguments_opens(net, tmp_path):
    "Published files hold an argparse.Namespace, which plain loading refuses."
    import argparse
    state = net.state_dict()
    torch.save(dict(model=state, args=argparse.Namespace(lr=1)), tmp_path / "checkpoint.pth")
    got = motrv2.load(tmp_path / "checkpoint.pth")
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("line,why", [
    ("1,7,1,1,9,9,1", "eight numbers"), ("1,7.5,1,1,9,9,1,1", "whole numbers"), ("0,7,1,1,9,9,1,1", "counted from 1"),
    ("1,-7,1,1,9,9,1,1", "below 0"), ("1,7,nan,1,9,9,1,1", "NaN"), ("1,5,1,1,9,9,1,1", "twice")])
def test_bad_truth_names_its_line(line, why, tmp_path):
    gt = tmp_path / "gt.txt"
    gt.write_text(f"1,5,1,1,9,9,1,1\n{line}\n")
    with pytest.raises(InputError, match=f"gt.txt:2: .*{why}"):
        motrv2_clips.read_gt(gt)


def test_unsorted_truth_and_ids_after_a_gap(tmp_path):
    gt = tmp_path / "gt.txt"
    gt.write_text("9,5,1,1,9,9,1,1\n1,5,1,1,9,9,1,1\n1.0,6.0,1,1,9,9,1,1\n")
    got = motrv2_clips.read_gt(gt)
    assert list(got) == [1, 9] and got[1][1].tolist() == [5, 6]


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_augmentation_keeps_boxes_with_the_picture(seed):
    "A white box on black stays under its box, whatever is done to both."
    rng = np.random.default_rng(seed)
    im = np.zeros((180, 320, 3), np.uint8)
    x, y, w, h = rng.integers(0, 200), rng.integers(0, 100), rng.integers(40, 100), rng.integers(40, 70)
    im[y:y + h, x:x + w] = 255
    box = np.array([[x, y, x + w, y + h]], float)
    v = motrv2_clips.View(im, box, np.array([3]), box, np.array([.5]))
    out, = motrv2_clips.augment([v], rng, .3)
    assert len(out.ids) == len(out.scores) <= 1
    bright = out.image.max(2) > 150
    if not len(out.ids):
        return
    a, b, c, d = out.boxes_xyxy[0].round().astype(int)
    inside = np.zeros(bright.shape, bool)
    inside[max(b - 1, 0):d + 1, max(a - 1, 0):c + 1] = True
    assert not (bright & ~inside).any()
    assert min(c - a, d - b) < 8 or bright[b + 3:d - 3, a + 3:c - 3].all()


def test_a_lost_track_dies_after_its_tolerance():
    q = fresh(torch.zeros(1, 4), torch.zeros(1, 8))
    q.ids[:] = 4
    for _ in range(3):
        assert q.ids.tolist() == [4]
        motrv2.live(q, torch.tensor([.1]), 5, miss_tolerance=3)
    assert q.ids.tolist() == [-1]


def test_a_changed_number_fails(shared, tmp_path):
    "The checks of units and data see one number moved by three tolerances."
    import json
    import shutil

    import goldenkit
    src = shared / "golden" / "motrv2"
    for f in ("units.json", "units.npz", "data.json"):
        shutil.copy(src / f, tmp_path / f)
    data = json.loads((tmp_path / "units.json").read_text())
    with np.load(tmp_path / "units.npz") as z:
        arrays = {k: z[k] for k in z.files}
    aside = re.compile(r"score$|box$|.*_in$|giou_boxes|focal_(logits|targets)|attn/(src|query|ref|spatial|samp|att|val|outp)")
    outs = [k for k in arrays if not aside.match(k)]
    assert len(outs) == 8
    for k in outs:
        bad = dict(arrays)
        bad[k] = np.array(arrays[k], np.float64)
        bad[k].reshape(-1)[-1] += 3 * data["tolerance"]["absolute"]
        np.savez(tmp_path / "units.npz", **bad)
        assert goldenkit.score(tmp_path / "units.json", data)[0] > 1, k
    assert golden_motrv2.NAMES
    data = json.loads((tmp_path / "data.json").read_text())
    data["frames"]["3"]["gt_boxes_xyxy"][1][2] += .003
    assert goldenkit.score(tmp_path / "data.json", data)[0] > 1


def test_memory_of_embed_only_tuning():
    "The full-size network keeps at most 60 MB for a 711x400 frame."
    with torch.device("meta"):
        m = MOTRv2()
    m = m.to_empty(device="cpu")
    with torch.no_grad():
        for p in (*m.parameters(), *m.buffers()):
            p.fill_(.01)
    motrv2_training.choose(m, True)
    c = clip(1, (400, 711), people=10, proposals=20)
    got = motrv2_training.held_bytes(m, lambda: motrv2_loss.clip_loss(m, c, embed_only=True).total)
    assert 5e6 < got <= 60e6
