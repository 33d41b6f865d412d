"""What goes wrong in silence when a DETR is put on DINOv3, each as a test;
geometry against transformers' own processor; the detector's round trips."""
import copy
import os
import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from crowdlens.core.letterbox import (Letterbox, from_network, letterbox,
                                      place, to_network)
from crowdlens.models import checkpoints, matching
from crowdlens.models.detector import Detector, save_hugging_face
from crowdlens.models.detr import (PRESETS, arrange, build, load_backbone,
                                   random_backbone)
from transformers import (DetrConfig, DetrForObjectDetection,
                          DetrImageProcessor, TimmBackbone,
                          TimmBackboneConfig)
from transformers.loss.loss_for_object_detection import (
    ForObjectDetectionLoss, HungarianMatcher)

SMALL = dict(d_model=32, encoder_layers=1, decoder_layers=2, num_queries=9,
             encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=64)
G = torch.Generator().manual_seed(0)


def objects(n, g=G):
    "`n` random objects."
    return dict(class_labels=torch.randint(0, 2, (n,), generator=g),
                boxes=torch.rand(n, 4, generator=g)*.3 + .2)


sizes = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, st.sampled_from(["pad", "stretch", "keep"]),
       st.sampled_from(["shrink", "turn"]), st.integers(16, 2000),
       st.integers(16, 2000), st.integers(0, 2**31))
def test_boxes_come_back(h, w, fit, portrait, H, W, seed):
    box = Letterbox(H, W, 16, fit, portrait)
    p = place(box, h, w)
    assert all(1 <= v <= c and c % 16 == 0 for v, c in zip(p.valid, p.canvas))
    b = np.sort(np.random.default_rng(seed).random((20, 2, 2)), 1
                ).reshape(-1, 4)*[w, h, w, h]
    assert np.abs(from_network(p, to_network(p, b)) - b).max() < 1e-8
    rel = to_network(p, b)
    assert rel.min() >= 0 and rel.max() <= 1 + 1e-12


@pytest.mark.parametrize("h,w", [(1080, 1920), (480, 640), (1920, 1080),
                                 (333, 777), (2000, 1000), (50, 4000)])
def test_boxes_identical_to_transformers(h, w):
    "Same valid size and same boxes as the stock processor on our canvas."
    box = Letterbox(960, 1536)
    proc = DetrImageProcessor(size=dict(max_height=960, max_width=1536),
        pad_size=dict(height=960, width=1536), do_pad=True)
    im = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    xywh = [[w*.25, h*.5, w*.125, h*.25], [0, 0, w, h]]
    enc = proc(images=im, annotations=dict(image_id=1, annotations=[
        dict(bbox=b, category_id=0, area=1., iscrowd=0) for b in xywh]),
        return_tensors="pt")
    b = np.array(xywh); b[:, 2:] += b[:, :2]
    p = place(box, h, w)
    got = enc["labels"][0]["boxes"].numpy()
    assert np.abs(to_network(p, b) - got).max() < 1e-6
    mask = enc["pixel_mask"][0]
    assert (mask.any(1).sum(), mask.any(0).sum()) == p.valid


def test_the_plans_processor_refuses_portrait_and_ours_does_not():
    proc = DetrImageProcessor(size=dict(shortest_edge=960, longest_edge=1536),
        pad_size=dict(height=960, width=1536), do_pad=True)
    im = np.zeros((1920, 1080, 3), np.uint8)
    with pytest.raises(ValueError): proc(images=im)
    assert letterbox(im, Letterbox())[1].valid == (960, 540)


def test_small_images_and_odd_ones():
    for shape in ((1, 1), (1, 3000), (3000, 1), (16, 16)):
        c, p = letterbox(np.full((*shape, 3), 7, np.uint8), Letterbox(64, 96))
        assert c.shape == (64, 96, 3) and min(p.valid) >= 1
        assert (c[:p.valid[0], :p.valid[1]] == 7).all()


@pytest.mark.parametrize("T", [0, 1, 12])
def test_losses_are_transformers(T):
    cfg = DetrConfig(num_labels=2, auxiliary_loss=True, decoder_layers=3)
    lg = torch.randn(3, 3, 9, 3, generator=G, requires_grad=True)
    b = (torch.rand(3, 3, 9, 4, generator=G)*.4 + .1).requires_grad_()
    labels = [objects(T), objects(3), objects(0)]
    a = matching.detr_loss(lg[-1], labels, "cpu", b[-1], cfg, lg, b)
    t = ForObjectDetectionLoss(lg[-1], labels, "cpu", b[-1], cfg, lg, b)
    for k in t[1]: assert torch.allclose(a[1][k], t[1][k], atol=1e-6), k
    assert torch.allclose(a[0], t[0], rtol=1e-5)
    assert a[1]["objects_left_out"] == max(0, T - 9)
    ga, gt = (torch.autograd.grad(x[0], [lg, b], retain_graph=True)
              for x in (a, t))
    for x, y in zip(ga, gt): assert torch.allclose(x, y, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=4),
       st.integers(1, 10), st.integers(0, 2**31))
def test_pairs_are_transformers(counts, Q, seed):
    g = torch.Generator().manual_seed(seed)
    lg = torch.randn(1, len(counts), Q, 3, generator=g)
    b = torch.rand(1, len(counts), Q, 4, generator=g)*.5 + .1
    labels = [objects(n, g) for n in counts]
    (i, q, o), = matching.match(lg, b, labels, (1, 5, 2))
    want = HungarianMatcher(1, 5, 2)(dict(logits=lg[0], pred_boxes=b[0]),
                                     labels)
    for k, (wq, wo) in enumerate(want):
        assert torch.equal(q[i == k], wq) and torch.equal(o[i == k], wo)


def test_nan_outputs_are_paired_last_and_reach_the_loss():
    lg, b = torch.randn(1, 1, 4, 3, generator=G), torch.rand(1, 1, 4, 4)*.3+.2
    lg[0, 0, 2] = torch.nan
    _, q, _ = matching.match(lg, b, [objects(3)])[0]
    assert 2 not in q.tolist()
    cfg = DetrConfig(num_labels=2, auxiliary_loss=False)
    loss = matching.detr_loss(lg[0], [objects(3)], "cpu", b[0], cfg)[0]
    assert not loss.isfinite()


def _rank(rank, port, out):
    "One process of two: the loss of its image."
    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    g = torch.Generator().manual_seed(1)
    lg, b = torch.randn(2, 5, 3, generator=g), torch.rand(2, 5, 4, generator=g)
    labels = [objects(1, g), objects(3, g)]
    cfg = DetrConfig(num_labels=2, auxiliary_loss=False)
    k = slice(rank, rank + 1)
    d = matching.detr_loss(lg[k], labels[k], "cpu", b[k], cfg)[1]
    torch.save({n: v.item() for n, v in d.items()}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_not_double_the_box_terms(tmp_path):
    with socket.socket() as s: s.bind(("", 0)); port = s.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (port, str(tmp_path)), 2,
                                          start_method="fork")
    parts = [torch.load(tmp_path/f"{r}.pt") for r in (0, 1)]
    g = torch.Generator().manual_seed(1)
    lg, b = torch.randn(2, 5, 3, generator=g), torch.rand(2, 5, 4, generator=g)
    labels = [objects(1, g), objects(3, g)]
    cfg = DetrConfig(num_labels=2, auxiliary_loss=False)
    whole = matching.detr_loss(lg, labels, "cpu", b, cfg)[1]
    for k in ("loss_bbox", "loss_giou"):
        mean = sum(p[k] for p in parts)/2  # as DDP averages gradients
        assert mean == pytest.approx(whole[k].item(), rel=1e-5)


def trained(m, n=3):
    "`m` after `n` steps on random images."
    opt = torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=.1); m.train()
    for _ in range(n):
        opt.zero_grad()
        m(torch.rand(2, 3, 64, 96, generator=G),
          labels=[objects(3), objects(2)]).loss.backward(); opt.step()
    return m


@pytest.mark.parametrize("back", ["tiny", "tiny-convnext"])
def test_frozen_is_bit_equal_and_thawed_moves(back):
    m = build(back, **SMALL)
    was = copy.deepcopy(m.model.backbone.state_dict())
    trained(m)
    for k, v in m.model.backbone.state_dict().items():
        assert torch.equal(v, was[k]), k
    assert all(p.grad is None for p in m.model.backbone.parameters())
    trained(arrange(m, freeze=False))
    now = m.model.backbone.state_dict()
    moved = {k for k in was if not torch.equal(now[k], was[k])}
    assert len(moved) > len(was)*.6
    assert not any("mask_token" in k for k in moved)
    assert not m.model.backbone.model.training


def test_features_same_in_training_and_equal_to_stock():
    vit = random_backbone(dict(PRESETS["tiny"], initializer_range=.3), 2)
    m = build(vit, **SMALL).train()
    x = torch.rand(2, 3, 64, 96, generator=G)
    a, b = (m.model.backbone.maps(x)[-1] for _ in range(2))
    with torch.no_grad(): want = vit.eval()(x).feature_maps[-1]
    assert torch.equal(a, b) and torch.equal(a, want) and a.grad_fn is None
    vit.train()
    with torch.no_grad(): other = vit(x).feature_maps[-1]
    assert (other - want).norm()/want.norm() > .01  # the trap is there


def test_arranged_model_equals_stock_and_copies_are_their_own():
    m = build("tiny", **SMALL).eval()
    s = DetrForObjectDetection(m.config).eval()
    s.load_state_dict(m.state_dict())
    x, lab = torch.rand(2, 3, 64, 96, generator=G), [objects(3), objects(0)]
    with torch.no_grad():
        a, b = m(x, labels=lab), s(x, labels=lab)
        assert torch.allclose(a.logits, b.logits, atol=1e-6)
        assert torch.allclose(a.loss, b.loss, rtol=1e-5)
        twin = copy.deepcopy(m)
        for p in twin.parameters(): p.mul_(1.5)
        s.load_state_dict(twin.state_dict())
        assert torch.allclose(twin(x).pred_boxes, s(x).pred_boxes, atol=1e-5)
        assert torch.equal(m(x).logits, a.logits)


def test_configuration_alone_leaves_the_backbone_random():
    vit = load_backbone("tiny", 5)
    s = DetrForObjectDetection(build(vit, **SMALL).config)
    w = "embeddings.patch_embeddings.weight"
    assert not torch.equal(s.model.backbone.model.state_dict()[w],
                           vit.state_dict()[w])
    assert torch.equal(build(vit, **SMALL).model.backbone.model.state_dict()[
        w], vit.state_dict()[w])


def test_start_of_the_head_is_detrs():
    m = build("tiny", **dict(SMALL, num_queries=200))
    s = DetrForObjectDetection(m.config)
    q = [k.model.query_position_embeddings.weight.std() for k in (m, s)]
    assert .9 < q[0] < 1.1 and q[1] < .05
    b = build("tiny", **dict(SMALL, num_queries=200))
    for k, v in m.state_dict().items(): assert torch.equal(
        v, b.state_dict()[k])


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(3); a = torch.rand(2)
    torch.manual_seed(3); build("tiny", **SMALL)
    assert torch.equal(torch.rand(2), a)


def test_auxiliary_loss_changes_the_forward_pass():
    "The flag is the model's: with it flipped the same weights say other things."
    m = trained(build("tiny", **SMALL)).eval()
    for p in m.model.decoder.layernorm.parameters():
        p.data.add_(torch.randn(p.shape, generator=G)*.3)
    x = torch.rand(1, 3, 64, 96, generator=G)
    with torch.no_grad():
        a = m(x).logits
        m.config.auxiliary_loss = m.model.decoder.config.auxiliary_loss = False
        assert (m(x).logits - a).abs().max() > 1e-3
    assert build("tiny", **SMALL).config.auxiliary_loss


def test_boxes_stay_fp32_under_bf16():
    m = build("tiny", **SMALL).eval()
    x = torch.rand(1, 3, 64, 96, generator=G)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16): out = m(x)
        exact = m(x).pred_boxes
    assert out.pred_boxes.dtype == torch.float32
    assert len(torch.unique(out.pred_boxes)) == len(torch.unique(exact))
    half = copy.deepcopy(m).to(torch.bfloat16)
    with torch.no_grad():
        assert half(x.bfloat16()).pred_boxes.dtype == torch.float32


def test_timm_backbone():
    cfg = TimmBackboneConfig(backbone="vit_small_patch16_dinov3",
                             features_only=True, out_indices=[-1])
    m = build(TimmBackbone(cfg, pretrained=False), **SMALL)
    assert trained(m, 1)(torch.rand(1, 3, 64, 96)).logits.shape == (1, 9, 3)
    assert not any(p.requires_grad for p in m.model.backbone.parameters())


def test_no_encoder_and_gradient_checkpointing():
    m = build("tiny", **dict(SMALL, encoder_layers=0))
    assert len(m.model.encoder.layers) == 0
    m.gradient_checkpointing_enable()
    trained(m, 1)


def test_a_folder_round_trip_keeps_every_answer(tmp_path):
    m = trained(build("tiny", **SMALL)).eval()
    ck = checkpoints._wrap(m, dict(geometry=Letterbox(64, 96)), "m")
    save_hugging_face(ck, tmp_path/"hf")
    a, b = Detector(ck), Detector(tmp_path/"hf")
    ims = [np.random.default_rng(k).integers(0, 256, (h, w, 3), np.uint8)
           for k, (h, w) in enumerate([(64, 96), (200, 100), (37, 501)])]
    for x, y in zip(a.detect(ims), b.detect(ims)):
        assert all(np.array_equal(u, v) for u, v in zip(x, y))
    s = DetrForObjectDetection.from_pretrained(tmp_path/"hf")
    for k, v in m.state_dict().items(): assert torch.equal(
        v, s.state_dict()[k]), k


def test_detect_real_images(shared):
    "Grey, turned, palette, CMYK and 16-bit pictures all go through."
    folder = shared/"realdata"/"broken_images"
    names = ["hopper_gray.jpg", "hopper_orientation_6.jpg", "Portrait_1.jpg",
             "pil_sample_cmyk.jpg", "hopper.jpg"]
    det = Detector(build("tiny", **SMALL), geometry=Letterbox(64, 96))
    got = det.detect([folder/n for n in names], batch=2)
    assert [g[0].shape for g in got] == [(9, 4)]*5
    assert np.array_equal(got[-1][0].shape, (9, 4))
