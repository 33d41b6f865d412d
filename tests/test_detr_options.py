"""Options beyond the plan and lean layers: shapes, gradients, frozen weights,
saved and opened through every door; same numbers for less."""
import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForObjectDetection

from crowdlens.core.files import InputError
from crowdlens.models import detr, detr_beyond, lean
from crowdlens.models.feature_cache import take_maps

SMALL = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, num_queries=9, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=64, dropout=0.0,
)
VIT = dict(detr.PRESETS["tiny"], num_hidden_layers=3)
OPTIONS = {
    "blocks": dict(blocks=(1, 3)),
    "norm": dict(group_norm=True),
    "two_stage": dict(two_stage=True),
    "refine": dict(refine=True),
    "wide": dict(d_model=288, two_stage=True),
    "all": dict(blocks=(1, 2, 3), group_norm=True, two_stage=True, refine=True),
}


def make(kind, seed=0):
    return detr_beyond.build_beyond(VIT, seed=seed, **{**SMALL, **OPTIONS[kind]})


def batch(seed=0, n=2):
    g = torch.Generator().manual_seed(seed)
    labels = [
        dict(class_labels=torch.randint(0, 2, (k,), generator=g), boxes=torch.rand(k, 4, generator=g) * 0.3 + 0.2)
        for k in (3, 0)[:n]
    ]
    return torch.randn(n, 3, 64, 96, generator=g), labels


@pytest.mark.parametrize("kind", OPTIONS)
def test_trains_and_leaves_the_backbone_alone(kind):
    m = make(kind).train()
    x, lab = batch()
    before = {k: v.clone() for k, v in m.model.backbone.state_dict().items()}
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3, weight_decay=0.1)
    first = None
    for _ in range(25):
        out = m(x, labels=lab)
        first = first or out.loss.item()
        opt.zero_grad()
        out.loss.backward()
        idle = [n for n, p in m.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
        assert not idle
        nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        opt.step()
    assert out.loss.item() < 0.8 * first
    for k, v in m.model.backbone.state_dict().items():
        assert torch.equal(v, before[k])
    assert out.pred_boxes.shape == (2, 9, 4) and out.logits.shape == (2, 9, 3)
    assert 0 <= out.pred_boxes.min() and out.pred_boxes.max() <= 1


@pytest.mark.parametrize("kind", OPTIONS)
def test_saved_and_opened(kind, tmp_path):
    m = make(kind, 1).eval()
    x, _ = batch(1)
    with torch.no_grad():
        want = m(x)
    m.save_pretrained(tmp_path)
    again = detr.arrange(AutoModelForObjectDetection.from_pretrained(tmp_path)).eval()
    with torch.no_grad():
        got = again(x)
    assert torch.allclose(got.pred_boxes, want.pred_boxes, atol=1e-5)
    assert torch.allclose(got.logits, want.logits, atol=1e-4)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model_type"] == "crowdlens_detr"


def test_without_options_it_is_the_plans():
    m = detr_beyond.build_beyond(VIT, **SMALL)
    assert m.config.model_type == "detr"
    plain = detr.build(VIT, **SMALL)
    for a, b in zip(m.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_options_off_and_weights_copied_give_the_same_numbers():
    plain = detr.build(VIT, **SMALL).eval()
    cfg = detr_beyond.BeyondConfig(**{k: v for k, v in plain.config.to_dict().items() if k not in ("model_type", "architectures")})
    same = detr_beyond.BeyondDetr(cfg)
    same.load_state_dict(plain.state_dict())
    x, lab = batch()
    with torch.no_grad():
        a, b = plain(x, labels=lab), detr.arrange(same).eval()(x, labels=lab)
    assert torch.equal(a.pred_boxes, b.pred_boxes) and torch.equal(a.loss, b.loss)


@pytest.mark.parametrize("kind", ["blocks", "all"])
def test_kept_maps_say_what_pixels_say(kind):
    m = take_maps(make(kind)).eval()
    x, _ = batch()
    with torch.no_grad():
        maps = m.model.backbone.maps(x)[-1]
        assert maps.shape[1] == 64 * len(OPTIONS[kind]["blocks"])
        assert torch.allclose(m(maps).pred_boxes, m(x).pred_boxes, atol=1e-5)


@pytest.mark.parametrize("blocks", [(0,), (4,), (2, 1), (1, 1)])
def test_blocks_that_are_not_there(blocks):
    with pytest.raises(InputError, match="counted from 1"):
        detr_beyond.build_beyond(VIT, blocks=blocks, **SMALL)
    with pytest.raises(InputError, match="counted from 1"):
        detr_beyond.build_beyond("tiny-convnext", blocks=(1, 2), **SMALL)


def test_refined_boxes_start_where_their_reference_is():
    "The fresh head moves no box; a moved one moves every later layer's."
    m = make("two_stage").eval()
    x, _ = batch()
    with torch.no_grad():
        hw, pos, mem = m._see(x, None)
        _, boxes = m._propose(mem, hw)
        _, layers = m._decode(pos, mem, boxes)
    for b in layers:
        assert torch.allclose(b, boxes, atol=1e-4)
    at = detr_beyond.anchors(*hw)
    assert all(((at[None] - b[:, None]).abs().sum(-1).min(1).values < 1e-3).all() for b in boxes)


def test_fewer_places_than_queries():
    m = detr_beyond.build_beyond(VIT, **{**SMALL, "num_queries": 40}, two_stage=True).train()
    x, lab = batch()
    out = m(x, labels=lab)
    assert out.pred_boxes.shape[1] == 24  # 4 x 6 places
    out.loss.backward()


needs_onednn = pytest.mark.skipif(not lean.has_onednn(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("rows,i,o", [((2, 700), 64, 128), ((1, 3000), 96, 32), ((40, 40), 48, 64)])
def test_products_and_gradients_are_torchs(rows, i, o):
    g = torch.Generator().manual_seed(0)
    a = nn.Linear(i, o)
    b = copy.deepcopy(a)
    b.__class__ = lean.FastLinear
    x = torch.randn(*rows, i, generator=g)
    got = []
    for m in (a, b):
        y = x.clone().requires_grad_()
        out = m(y)
        (out**2).mean().backward()
        got.append([out.detach(), y.grad, m.weight.grad, m.bias.grad])
    for u, v in zip(*got, strict=True):
        assert u.shape == v.shape and (u - v).norm() < 1e-5 * u.norm()


@needs_onednn
def test_lean_network_is_the_stock_network():
    "Loss and every gradient of a DETR with layers exchanged."
    from transformers import DetrForObjectDetection

    big = dict(SMALL, d_model=64, encoder_ffn_dim=2048, decoder_ffn_dim=512)
    m = detr.build(VIT, **big).train()
    kinds = {type(k).__name__ for k in m.modules()}
    assert {"FastLinear", "LeanMLP"} <= kinds and "DetrMLP" not in kinds
    stock = DetrForObjectDetection(m.config).train()
    stock.load_state_dict(m.state_dict())
    stock.model.freeze_backbone()
    stock.model.backbone.eval()
    g = torch.Generator().manual_seed(0)
    x, lab = torch.randn(2, 3, 192, 256, generator=g), batch()[1]
    for k in (m, stock):
        loss = k(x, labels=lab).loss
        loss.backward()
    for (n, p), q in zip(m.named_parameters(), stock.parameters(), strict=True):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-6, n


def test_lean_copies_and_pickles_of_weights():
    m = detr.build(VIT, **SMALL)
    c = copy.deepcopy(m)
    c.class_labels_classifier.weight.data.zero_()
    assert not torch.equal(m.class_labels_classifier.weight, c.class_labels_classifier.weight)
    assert np.array_equal(list(m.state_dict()), list(c.state_dict()))


def test_a_run_s_checkpoint_opens_through_the_one_door(tmp_path):
    from safetensors.torch import save_file

    from crowdlens.core.letterbox import Letterbox, to_dict
    from crowdlens.models import checkpoints
    from crowdlens.models.detector import Detector

    m = make("all", 2).eval()
    folder = tmp_path / "epoch-0001"
    folder.mkdir()
    save_file(m.state_dict(), folder / "model.safetensors")
    m.config.save_pretrained(folder)
    (folder / "crowdlens.json").write_text(
        json.dumps(dict(kind="detector", names={0: "person", 1: "head"}, geometry=to_dict(Letterbox(64, 96))))
    )
    ck = checkpoints.open(folder)
    assert ck.loaded.whole and type(ck.model) is detr_beyond.BeyondDetr
    x, _ = batch(2)
    with torch.no_grad():
        assert torch.allclose(ck.model(x).pred_boxes, m(x).pred_boxes, atol=1e-5)
    (boxes, scores, labels), = Detector(ck).detect(np.zeros((128, 192, 3), np.uint8))
    assert boxes.shape == (9, 4) and boxes.max() <= 192 and set(labels) <= {0, 1}


def test_the_stage_offers_the_options():
    from crowdlens import detr_dinov3 as stage

    small = dict(data="world", backbone="tiny", d_model=32, encoder_layers=1, decoder_layers=1, num_queries=9)
    names = ["person", "head"]
    assert stage.make_model(stage.Config(**small), names).config.model_type == "detr"
    m = stage.make_model(stage.Config(**small, blocks="1, 2", group_norm=True, two_stage=True, refine=True), names)
    assert isinstance(m, detr_beyond.BeyondDetr) and list(m.config.blocks) == [1, 2]
    x, lab = batch()
    assert torch.isfinite(m.train()(pixel_values=x, labels=lab).loss)
    with pytest.raises(InputError, match="no list of numbers"):
        stage.make_model(stage.Config(**small, blocks="1-2"), names)


def test_other_classes_and_queries_of_a_two_stage_model():
    "`heads=remake`: proposals are judged by the new classes too; what has the same name stays."
    from crowdlens.models import checkpoints

    m = make("all")
    was = m.proposal_class.weight.detach().clone()
    with pytest.raises(InputError, match="heads=remake"):
        checkpoints.remake_heads(m, ["ball", "head", "person"])
    m, fresh = checkpoints.remake_heads(m, ["ball", "head", "person"], 12, True)
    assert fresh == ["ball", "3 queries"] and m.config.num_labels == 3
    now = m.proposal_class.weight.detach()
    assert now.shape[0] == 4 and torch.equal(now[[1, 2, 3]], was[[1, 0, 2]])
    m = detr.arrange(m).train()
    x, lab = batch()
    lab[0]["class_labels"] = torch.tensor([2, 0, 1])
    out = m(x, labels=lab)
    assert out.logits.shape == (2, 12, 4) and out.loss.isfinite()
    out.loss.backward()
    assert m.proposal_class.weight.grad.abs().sum(1).all()


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    "Without it the message says how to get it; settings.ini lists it."
    import configparser
    import sys
    import types
    from pathlib import Path

    from crowdlens import detr_dinov3 as stage

    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(Path(__file__).resolve().parents[1] / "settings.ini")
    assert ini["DEFAULT"]["tensorboard"].startswith("tensorboard>=")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    cfg = stage.Config(data="world", report_to="tensorboard")
    run = types.SimpleNamespace(main=True, folder=tmp_path)
    with pytest.raises(InputError, match=r"crowdlens\[tensorboard\]"):
        stage.tensorboard(cfg, run)
    assert stage.tensorboard(stage.Config(data="world"), run) == []
