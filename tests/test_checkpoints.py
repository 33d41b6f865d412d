"""Checkpoints of every kind: real layouts made small, hostile and broken
files, and a DETR of the original kind written out to compare with."""
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from crowdlens.core.files import InputError
from crowdlens.core.letterbox import Letterbox
from crowdlens.models import checkpoints
from crowdlens.models.detr import build, seeded
from transformers import (DetrConfig, DetrForObjectDetection,
                          TimmBackboneConfig)

SMALL = dict(d_model=32, encoder_layers=1, decoder_layers=2, num_queries=9,
             encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=64)


def resnet_detr(name="resnet18", seed=1, **kw):
    "A random DETR on a ResNet of timm's."
    back = TimmBackboneConfig(backbone=name, features_only=True,
                              use_pretrained_backbone=False,
                              out_indices=[1, 2, 3, 4])
    kw = SMALL | dict(encoder_attention_heads=8,
                      decoder_attention_heads=8) | kw
    with seeded(seed):
        m = DetrForObjectDetection(DetrConfig(backbone_config=back, **kw))
        for p in m.parameters():
            p.data.add_(torch.randn_like(p)*.02)
    return m.eval()


class Spring:
    "Runs a command when it is unpickled the usual way."
    def __init__(self, path): self.path = str(path)

    def __reduce__(self): return os.system, (f"touch {self.path}",)


class Deep(Spring):
    "The same by evaluated text, and with a state."
    def __reduce__(self):
        return (eval, (f"__import__('os').system('touch {self.path}')",),
                {"a": Spring(self.path)})


def hostile(tmp_path):
    "Three ways to hide a call in a weight file, and the mark each leaves."
    mark = tmp_path/"mark"
    good = dict(state_dict={"model.x": torch.ones(2)}, bad=Spring(mark),
                more=[Deep(mark), {"k": Spring(mark)}])
    torch.save(good, tmp_path/"zip.ckpt")
    torch.save(good, tmp_path/"old.ckpt",
               _use_new_zipfile_serialization=False)
    (tmp_path/"raw.ckpt").write_bytes(pickle.dumps(
        dict(state_dict={}, bad=Spring(mark))))
    return mark, ["zip.ckpt", "old.ckpt", "raw.ckpt"]


def test_hostile_files_run_nothing(tmp_path):
    mark, names = hostile(tmp_path)
    for name in names:
        for read in (checkpoints.read_weights, checkpoints.open,
                     checkpoints.load_lightning):
            try: read(tmp_path/name)
            except InputError: pass
            assert not mark.exists(), (name, read)
        pth = (tmp_path/name).with_suffix(".pth")
        pth.write_bytes((tmp_path/name).read_bytes())
        with pytest.raises(InputError): checkpoints.open(pth)
        assert not mark.exists(), name
    for name in names[:2]:
        got = checkpoints.read_weights(tmp_path/name)
        assert got["state_dict"]["model.x"].tolist() == [1, 1]
        assert isinstance(got["bad"], checkpoints.Inert)
    with pytest.raises(Exception):  # the files do bite elsewhere
        torch.load(tmp_path/"zip.ckpt", weights_only=False)
        assert not mark.exists()


def test_script_archives_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path/"a.pth")
    with pytest.raises(InputError): checkpoints.read_weights(tmp_path/"a.pth")


def lightning(path, net, extra=None, prefix="model.", **hyper):
    "What Lightning writes of a module that holds `net`."
    sd = {prefix + k: v for k, v in
          checkpoints.old_names(net.state_dict()).items()}
    torch.save({"epoch": 1, "global_step": 2, "state_dict": sd | (extra or {}),
                "pytorch-lightning_version": "2.6.0", "loops": {},
                "callbacks": {}, "optimizer_states": [], "lr_schedulers": [],
                "hyper_parameters": hyper}, path)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_lightning_is_inferred(tmp_path, name):
    net = resnet_detr(name, num_labels=3, num_queries=17)
    path = tmp_path/"best_epoch=6-step=51751-train_loss=2.9145.ckpt"
    lightning(path, net, {"crit.weight": torch.ones(4)}, lr=1e-4)
    got = checkpoints.load_lightning(path).eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(got(x).logits, net(x).logits)
        assert torch.equal(got(x).pred_boxes, net(x).pred_boxes)
    assert got.loaded.whole and got.loaded.left_over == ["crit.weight"]
    assert got.config.backbone_config.backbone == name
    assert (got.config.num_queries, got.config.num_labels) == (17, 3)


def test_plain_loading_would_have_lost_weights(tmp_path):
    "The trap: new code, old names, strict=False."
    net = resnet_detr()
    old = checkpoints.old_names(net.state_dict())
    other = resnet_detr(seed=2)
    lost = other.load_state_dict(old, strict=False).missing_keys
    assert len(lost) > 90
    assert checkpoints.fill(other, old).whole
    for k, v in net.state_dict().items():
        assert torch.equal(other.state_dict()[k], v), k


def test_lightning_into_a_given_model(tmp_path):
    net = build("tiny", **SMALL, seed=3)
    lightning(tmp_path/"a.ckpt", net)
    mine = build("tiny", **SMALL, seed=4)
    got = checkpoints.load_lightning(tmp_path/"a.ckpt", mine)
    assert got is mine and got.loaded.whole
    for k, v in net.state_dict().items():
        assert torch.equal(mine.state_dict()[k], v), k
    other = resnet_detr()
    was = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(InputError, match="do not fit"):
        checkpoints.load_lightning(tmp_path/"a.ckpt", other)
    for k, v in was.items(): assert torch.equal(other.state_dict()[k], v), k


def test_lightning_dinov3_needs_its_heads(tmp_path):
    net = build("tiny", **SMALL, seed=3).eval()
    lightning(tmp_path/"a.ckpt", net, id2label={0: "person", 1: "head"})
    got = checkpoints.open(tmp_path/"a.ckpt", heads=4, backbone_heads=2,
                           auxiliary_loss=True)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(got.model(x).logits, net(x).logits)
    assert got.labels.names == ("person", "head")


class Attention(nn.MultiheadAttention):
    def forward(self, q, k, v): return super().forward(q, k, v)[0]


class OldDetr(nn.Module):
    "The published DETR's transformer on given features, post-norm, no dropout."
    def __init__(self, back, d=32, heads=8, ffn=48, classes=3, queries=9):
        super().__init__()
        self.back = back
        self.input_proj = nn.Conv2d(512, d, 1)
        self.query_embed = nn.Embedding(queries, d)
        enc = nn.TransformerEncoderLayer(d, heads, ffn, 0., batch_first=True)
        dec = nn.TransformerDecoderLayer(d, heads, ffn, 0., batch_first=True)
        self.transformer = nn.Module()
        self.transformer.encoder = nn.TransformerEncoder(
            enc, 1, enable_nested_tensor=False)
        self.transformer.decoder = nn.TransformerDecoder(
            dec, 2, norm=nn.LayerNorm(d))
        self.class_embed = nn.Linear(d, classes + 1)
        self.bbox_embed = nn.Module()
        self.bbox_embed.layers = nn.ModuleList(
            nn.Linear(d, n) for n in (d, d, 4))

    def forward(self, f, pos):
        x = self.input_proj(f).flatten(2).transpose(1, 2)
        q = self.query_embed.weight[None].expand(len(x), -1, -1)
        for l in self.transformer.encoder.layers:
            x = l.norm1(x + l.self_attn(x + pos, x + pos, x)[0])
            x = l.norm2(x + l.linear2(l.linear1(x).relu()))
        y = torch.zeros_like(q)
        for l in self.transformer.decoder.layers:
            y = l.norm1(y + l.self_attn(y + q, y + q, y)[0])
            y = l.norm2(y + l.multihead_attn(y + q, x + pos, x)[0])
            y = l.norm3(y + l.linear2(l.linear1(y).relu()))
        y = self.transformer.decoder.norm(y)
        b = y
        for i, l in enumerate(self.bbox_embed.layers):
            b = l(b).relu() if i < 2 else l(b)
        return self.class_embed(y), b.sigmoid()


def test_published_detr_weights(tmp_path):
    "A .pth as the DETR repository saves it computes what that DETR computes."
    host = resnet_detr(num_labels=3, encoder_ffn_dim=48, decoder_ffn_dim=48)
    with seeded(5): old = OldDetr(None).eval()
    for p in old.parameters(): p.data.add_(torch.randn_like(p)*.05)
    sd = {k: v for k, v in old.state_dict().items()}
    sd |= {"backbone.0.body." + k: v for k, v in
           host.model.backbone.model.state_dict().items()}
    torch.save({"model": sd, "optimizer": {}, "epoch": 1}, tmp_path/"r.pth")
    got = checkpoints.open(tmp_path/"r.pth")
    assert got.loaded.whole and not got.loaded.left_over
    x = torch.rand(2, 3, 64, 96)
    m = got.model
    with torch.no_grad():
        (f, mask), = m.model.backbone(x, torch.ones(2, 64, 96))
        pos = m.model.position_embedding(f.shape, f.device, f.dtype, mask)
        logits, boxes = old(f, pos.flatten(2).transpose(1, 2))
        out = m(x)
    assert torch.allclose(out.logits, logits, atol=2e-5)
    assert torch.allclose(out.pred_boxes, boxes, atol=2e-5)


def run_folder(path, m, **info):
    path.mkdir(parents=True, exist_ok=True)
    save_file(m.state_dict(), path/"model.safetensors", {"format": "pt"})
    m.config.save_pretrained(path)
    (path/"crowdlens.json").write_text(json.dumps(dict(
        kind="detector", names={"1": "person", "2": "head"},
        geometry=dict(height=64, width=96)) | info))
    return path


def test_our_folder_and_broken_ones(tmp_path):
    m = build("tiny", **SMALL, seed=3).eval()
    d = run_folder(tmp_path/"epoch-0001", m)
    got = checkpoints.open(d)
    assert got.geometry == Letterbox(64, 96) and got.labels.ids == (1, 2)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(got.model(x).logits, m(x).logits)
    f = d/"model.safetensors"; whole = f.read_bytes()
    f.write_bytes(whole[:len(whole)//2])
    with pytest.raises(InputError, match="cut short"): checkpoints.open(d)
    sd = dict(m.state_dict()); sd.pop("bbox_predictor.layers.2.bias")
    save_file(sd, f, {"format": "pt"})
    with pytest.raises(InputError, match="bbox_predictor"):
        checkpoints.open(d)
    (d/"crowdlens.json").write_text("{")
    with pytest.raises(InputError, match="crowdlens.json"):
        checkpoints.open(d)
    run_folder(d, m, kind="tracker")
    with pytest.raises(InputError, match="tracker"): checkpoints.open(d)


def test_delta_is_whole_again_and_refused_by_others(tmp_path):
    m = build("tiny", **SMALL, seed=3).eval()
    last = run_folder(tmp_path/"epoch-0002", m)
    (tmp_path/"last").symlink_to("epoch-0002")
    delta, rec = checkpoints.split_delta(m.state_dict(), "tiny")
    d = run_folder(tmp_path/"epoch-0001", m, frozen=rec)
    (d/"model.safetensors").unlink()
    save_file(delta, d/"delta.safetensors", {"format": "pt"})
    got = checkpoints.open(d)
    for k, v in m.state_dict().items():
        assert torch.equal(got.model.state_dict()[k], v), k
    with pytest.raises(OSError): DetrForObjectDetection.from_pretrained(d)
    w = dict(m.state_dict())
    w["model.backbone.model.norm.bias"] = \
        w["model.backbone.model.norm.bias"] + 1e-3
    save_file(w, last/"model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="not the one"): checkpoints.open(d)


def test_delta_from_a_backbone_folder(tmp_path):
    from crowdlens.models.detr import load_backbone
    bb = load_backbone("tiny", 7); bb.save_pretrained(tmp_path/"bb")
    m = build(str(tmp_path/"bb"), **SMALL)
    delta, rec = checkpoints.split_delta(m.state_dict(), str(tmp_path/"bb"))
    d = run_folder(tmp_path/"run"/"epoch-0001", m, frozen=rec)
    (d/"model.safetensors").unlink()
    save_file(delta, d/"delta.safetensors", {"format": "pt"})
    assert checkpoints.open(d).loaded.whole


def test_other_classes_and_queries():
    m = build("tiny", **SMALL)
    with pytest.raises(InputError, match="remake"):
        checkpoints.remake_heads(m, ["person"])
    was = m.class_labels_classifier.weight.detach().clone()
    q = m.model.query_position_embeddings.weight.detach().clone()
    m, fresh = checkpoints.remake_heads(m, ["ball", "person"], 5, True)
    now = m.class_labels_classifier.weight.detach()
    assert torch.equal(now[1], was[0]) and torch.equal(now[2], was[2])
    assert torch.equal(m.model.query_position_embeddings.weight, q[:5])
    assert fresh == ["ball"] and m.config.num_labels == 2
    out = m(torch.rand(1, 3, 64, 96), labels=[dict(
        class_labels=torch.tensor([1]), boxes=torch.rand(1, 4)*.2 + .3)])
    assert out.logits.shape == (1, 5, 3) and out.loss.isfinite()
