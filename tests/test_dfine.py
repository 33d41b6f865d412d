"""D-FINE's weights and loss: what a notebook should not show."""
import copy
import json
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
import goldenkit
from crowdlens.core.class_names import COCO_NAMES
from crowdlens.core.files import InputError
from crowdlens.models import checkpoints, dfine
from crowdlens.models import dfine_criterion as dc
from crowdlens.models.small_detector import small_detector
from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

BACK = HGNetV2Config(
    stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 24], stage_mid_channels=[8, 8, 8],
    stage_out_channels=[16, 24, 32], hidden_sizes=[16, 24, 32], depths=[1, 1, 1], stage_num_blocks=[1, 1, 1],
    stage_numb_of_layers=[2, 2, 2], stage_downsample=[False, True, True], stage_kernel_size=[3, 3, 5],
    stage_downsample_strides=[2, 2, 2], stage_light_block=[False, False, True], embedding_size=8,
    use_learnable_affine_block=True, out_features=["stage2", "stage3"])


def small(labels=80, seed=1, **kw):
    cfg = DFineConfig(**dict(dict(
        backbone_config=BACK, encoder_in_channels=[24, 32], feat_strides=[16, 32], encode_proj_layers=[1],
        num_feature_levels=2, encoder_hidden_dim=32, d_model=32, hidden_expansion=.5, depth_mult=.34,
        decoder_in_channels=[32] * 2, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_layers=3,
        decoder_n_points=[6, 6], num_labels=labels, num_queries=300, freeze_backbone_batch_norms=False), **kw))
    torch.manual_seed(seed)
    return DFineForObjectDetection(cfg).eval()


def published(model):
    return dfine.to_published({k: v.clone() for k, v in model.state_dict().items()})


def equal(a, b):
    return [k for k, v in a.state_dict().items() if not torch.equal(v, b.state_dict()[k])] == []


def test_the_average_is_preferred_and_prefixes_are_dropped(tmp_path):
    a, b = small(seed=1), small(seed=2)
    torch.save(dict(model=published(a), ema=dict(module={"module." + k: v for k, v in published(b).items()},
                                                 updates=7), epoch=3), tmp_path / "x.pth")
    assert equal(checkpoints.load_dfine(tmp_path / "x.pth"), b)


def test_open_gives_the_published_geometry(tmp_path):
    torch.save(dict(model=published(small())), tmp_path / "x.pth")
    ck = checkpoints.open(tmp_path / "x.pth")
    assert (ck.geometry.canvas, ck.geometry.fit, ck.mean, ck.std) == ((640, 640), "stretch", (0,) * 3, (1,) * 3)
    assert ck.labels.names[0] == "person" and ck.loaded.whole


def test_a_hub_repository_that_holds_pth_files(tmp_path, monkeypatch):
    "As that of the challenge's team: no transformers folder, weights in `.pth`; `size` is theirs to say."
    import huggingface_hub as hub

    from crowdlens import dfine_fisheye as stage

    def none(*a, **k):
        raise OSError("no config.json")
    torch.save(dict(ema=dict(module=published(small(5, seed=4)))), tmp_path / "best_stg2.pth")
    monkeypatch.setattr(checkpoints.AutoModelForObjectDetection, "from_pretrained", none)
    monkeypatch.setattr(hub, "list_repo_files", lambda name: ["README.md", "last.pth", "best_stg2.pth"])
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, f: str(tmp_path / f))
    ck = checkpoints.open("somebody/fisheye")
    assert equal(ck.model, small(5, seed=4)) and ck.geometry.canvas == (640, 640)
    det = stage.eyes(stage.Config(model="somebody/fisheye", size=1280))
    assert det.geometry.canvas == (1280, 1280) and det.geometry.fit == "stretch"
    ours = stage.eyes(stage.Config(model="street", size=1280))
    assert ours.geometry == ours.checkpoint.geometry  # it says its own
    with pytest.raises(InputError, match="no detector that can be opened"):
        monkeypatch.setattr(hub, "list_repo_files", none)
        checkpoints.open("somebody/nothing")


@pytest.mark.parametrize("size", "nsmlx")
def test_settings_that_load_without_a_word(shared, size):
    "What transformers' defaults get wrong and nothing raises, for a fresh network of each size; shapes as published."
    cfg = dfine.size_config(size, COCO_NAMES)
    assert cfg.decoder_n_points == ([6, 6] if size == "n" else [3, 6, 3]) and cfg.eval_size is None
    assert cfg.reg_scale == (8 if size == "x" else 4) and cfg.initializer_bias_prior_prob == .01
    assert cfg.freeze_backbone_batch_norms == (size in "lx") and dfine.size_of(cfg) == size
    assert cfg.backbone_config.use_learnable_affine_block == (size in "nsm")
    with torch.device("meta"):
        net = DFineForObjectDetection(cfg)
    manifest = json.loads((shared / "golden" / "dfine" / f"manifest_{size}.json").read_text())
    want = dfine.to_transformers({k: torch.empty(s, device="meta") for k, (s, _) in manifest.items()})
    own = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in want.items() if "num_points_scale" not in k} == \
        {k: v for k, v in own.items() if "num_points_scale" not in k}
    stem = [n for n in dfine.freeze_stem(net) if "embedder" in n]
    assert (len(stem) >= 5) == (size in "lx")


def test_a_fresh_network_begins_as_the_authors_begin_it():
    cfg = small(5, num_denoising=20).config
    torch.manual_seed(0)
    net = dfine.start_heads(DFineForObjectDetection(cfg)).eval()
    emb = net.model.denoising_class_embed.weight
    assert emb.shape[0] == 6 and (emb[-1] == 0).all() and (emb[:-1] != 0).any()
    seen = []
    net.model.decoder.pre_bbox_head.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.inference_mode():
        net(pixel_values=torch.rand(1, 3, 320, 320))
    assert (seen[0] == 0).all()  # the first boxes lie where their anchors are


def test_what_is_missing_or_left_over_is_said(tmp_path):
    w = published(small())
    short = {k: v for k, v in w.items() if k != "decoder.pre_bbox_head.layers.2.bias"}
    with pytest.raises(InputError, match="1 missing.*pre_bbox_head"):
        dfine.load_dfine(short)
    got = dfine.load_dfine(w | {"decoder.something_else": torch.zeros(2)})
    assert got.loaded.left_over == ["model.decoder.something_else"]
    with pytest.raises(InputError, match="names for a network of 80"):
        dfine.load_dfine(w, names=["a", "b"])
    with pytest.raises(InputError, match="not among them"):
        dfine.load_dfine({k: v for k, v in w.items() if not k.startswith("encoder.fpn")})


@pytest.mark.parametrize("rows,first,last", [(80, "person", "toothbrush"), (366, "(none)", None), (5, "LABEL_0", "LABEL_4")])
def test_names_of_known_heads(rows, first, last):
    names = dfine.load_dfine(published(small(rows))).config.id2label
    assert names[0] == first and (last is None or names[rows - 1] == last) and len(set(names.values())) == rows


def test_a_hugging_face_folder_holds_the_same(tmp_path):
    m = dfine.load_dfine(published(small()))
    dfine.change_classes(m, ["Car", "Tram"])
    m.save_pretrained(tmp_path)
    again = DFineForObjectDetection.from_pretrained(tmp_path, dtype=torch.float32).eval()
    x = torch.rand(1, 3, 288, 288)
    with torch.inference_mode():
        a, b = m(pixel_values=x), again(pixel_values=x)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.pred_boxes, b.pred_boxes)
    assert again.config.id2label == {0: "Car", 1: "Tram"}


def test_no_code_of_a_file_runs(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save(dict(model=published(small()), note=Bad()), tmp_path / "x.pth")
    dfine.load_dfine(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


boxes = st.lists(st.tuples(*[st.floats(.05, .95)] * 2, *[st.floats(.02, .4)] * 2), min_size=1, max_size=8)


@given(boxes, boxes)
@settings(max_examples=40, deadline=None)
def test_edge_targets_are_the_true_offsets(refs, truth):
    n = min(len(refs), len(truth))
    r, t = torch.tensor(refs[:n]), torch.tensor(truth[:n])
    w = dc.bin_offsets()
    left, right = dc.edge_targets(r, t, w)
    got = w[left] * (1 - right) + w[left + 1] * right
    half = t[:, 2:] / 2
    far = torch.cat([r[:, :2] - t[:, :2] + half, t[:, :2] + half - r[:, :2]], 1)
    want = (far / (r[:, 2:].repeat(1, 2) / 4) - 2).clamp(w[0], w[-1])
    assert torch.allclose(got, want, atol=2e-4, rtol=1e-3)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_union_keeps_each_query_once(seed):
    rng = np.random.default_rng(seed)
    n, queries = rng.integers(0, 6, 3).tolist(), 9
    layers = [[(np.sort(rng.choice(queries, k, replace=False)), rng.permutation(k)) for k in n] for _ in range(4)]
    img, que, obj = dc.unite(layers, queries, n)
    assert len(set(zip(img, que))) == len(img)
    every = {(i, q) for layer in layers for i, (qs, _) in enumerate(layer) for q in qs}
    assert set(zip(img.tolist(), que.tolist())) == {(i, int(q)) for i, q in every}
    for i, q, o in zip(img, que, obj):
        votes = [int(layer[i][1][layer[i][0] == q][0]) for layer in layers if q in layer[i][0]]
        assert votes.count(o) == max(map(votes.count, votes))


def test_denoising_boxes_are_never_inside_out():
    torch.manual_seed(0)
    t = [dict(class_labels=torch.tensor([0, 1]), boxes=torch.tensor([[.5, .5, .3, .3], [.2, .2, .1, .1]]))]
    _, logit, _, meta = dc.denoising_queries(t, 2, 10, torch.nn.Embedding(3, 4), 100)
    assert meta["dn_num_group"] == 50 and (logit.sigmoid()[..., 2:] > 2e-5).float().mean() > .99


def test_labels_of_other_types_and_padding_do_not_matter():
    net = small_detector(["a", "b"], queries=20).train()
    x = torch.rand(2, 3, 96, 96)
    lab = [dict(class_labels=torch.tensor([1], dtype=torch.int32), boxes=torch.rand(1, 4, dtype=torch.float64) * .5),
           dict(class_labels=torch.zeros(0).long(), boxes=torch.zeros(0, 4))]
    terms = dc.LossModel(net)(x, [dict(t, boxes=t["boxes"].float()) for t in lab])
    assert all(v.isfinite() for v in terms.values()) and terms["loss_bbox"] > 0


def results(x, skip=("tolerance", "weights", "vfl", "matcher", "num_classes", "batch", "reg_max", "reg_scale", "up",
                     "tie_sensitivity")):
    for k, v in x.items() if isinstance(x, dict) else enumerate(x):
        if k in skip:
            continue
        if isinstance(v, (dict, list)):
            yield from results(v, skip)
        elif isinstance(v, (int, float)) and not isinstance(v, bool):
            yield x, k


@pytest.mark.parametrize("name", ["criterion", "recipe"])
def test_a_changed_number_fails(shared, name):
    path = shared / "golden" / "dfine" / f"{name}.json"
    data = json.loads(path.read_text())
    n = len(list(results(data)))
    for i in random.Random(1).sample(range(n), 12 if name == "criterion" else 4):
        new = copy.deepcopy(data)
        box, key = list(results(new))[i]
        box[key] = box[key] * (1 + 6e-4) + 6e-5 if isinstance(box[key], float) else box[key] + 1
        assert not golden.check(name, path, new)[0], (name, key)


def test_a_changed_array_fails(shared, tmp_path):
    src = shared / "golden" / "dfine"
    data = json.loads((src / "forward_n.json").read_text())
    (tmp_path / "manifest_n.json").write_text((src / "manifest_n.json").read_text())
    with np.load(src / "forward_n.npz") as z:
        z = dict(z)
    for key, at, by in (("logits", (1, 7, 3), .01), ("top_scores", (0, 299), .002), ("top_boxes", (1, 5, 2), 1.),
                        ("boxes", (0, 0, 0), .001), ("top_labels", (0, 3), 1)):
        new = {k: v.copy() for k, v in z.items()}
        new[key][at] += by
        np.savez(tmp_path / "forward_n.npz", **new)
        assert goldenkit.score(tmp_path / "forward_n.json", data)[0] > 1, key
