"""SlowFast: what its notebooks do not show. Files, broken files, settings."""
import io
import json
import pickle
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from crowdlens import slowfast_finetune as stage
from crowdlens.core.files import InputError
from crowdlens.models import action_training as training
from crowdlens.models import slowfast as sf
from crowdlens.models.action_loss import Group, action_loss
from crowdlens.models.action_yaml import from_alphaction_yaml
from crowdlens.models.memory_pool import MemoryPool
from crowdlens.models.slowfast_pathways import SplitConv

GROUPS = (Group("posture", 2, True, 1.0), Group("other", 1, False, 1.0))
SMALL = replace(sf.TINY, frames=16, tau=8, alpha=4, frozen=True)
IA = sf.Interaction("dense", dim=SMALL.dim, inner=8, out=SMALL.dim, before=2, after=2, max_person=4, max_per_sec=2,
                    max_object=2, dropout=0.0)


def small(ia=IA, groups=GROUPS, pathways=SMALL, seed=0):
    return sf.fresh(sf.ActionConfig(pathways, groups, 16, 0.0, ia=ia and replace(ia)), seed)


def awake(model):
    "Weights that let every part count; a fresh one starts with zeros."
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** .5)
    return model.eval()


def clip(seed, people=2):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, 8, 48, 64, generator=g)
    at = torch.rand(people, 2, generator=g) * 20
    boxes = torch.cat([at, at + torch.tensor([20.0, 24.0])], 1)
    y = torch.zeros(people, 3)
    y[range(people), torch.randint(0, 3, (people,), generator=g)] = 1
    return dict(slow=x[:, :, 1::4], fast=x, sizes=[(48, 64)], boxes=[boxes], labels=y, keys=[("film", seed)])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 1, 1), (1, 3, 3), (3, 1, 1), (5, 1, 1), (5, 7, 7), (3, 3, 3)]), st.integers(1, 3),
       st.integers(1, 2), st.integers(1, 2), st.booleans(), st.integers(0, 99))
def test_split_convolutions_equal_torch(kernel, time_step, step, dilation, last, seed):
    torch.manual_seed(seed)
    if kernel == (5, 7, 7):
        dilation = 1
    pad = kernel[0] // 2, dilation * (kernel[1] // 2), dilation * (kernel[2] // 2)
    conv = SplitConv(2, 3, kernel, (time_step, step, step), pad, (1, dilation, dilation))
    x = torch.randn(2, 2, 6, 9, 8, requires_grad=True)
    y = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    want = torch.nn.functional.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)
    got = conv(y)
    assert got.shape == want.shape
    assert torch.allclose(got, want, atol=1e-5)
    weight = torch.randn(want.shape)
    a, = torch.autograd.grad((got * weight).sum(), conv.weight)
    b, = torch.autograd.grad((want * weight).sum(), conv.weight)
    assert torch.allclose(a, b, atol=1e-4)


def spelled(state, how):
    "A state dict as it may lie in a file."
    if how == "parallel":
        return {"model": {"module." + k: v for k, v in state.items()}}
    if how == "bare backbone":
        return {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    if how == "kinetics":
        back = {"module." + k: v for k, v in state.items() if k.startswith("backbone.")}
        back["module.backbone.slow.bn1.num_batches_tracked"] = torch.tensor(3)
        return {"model": back | {"module.cls_head.pred.weight": torch.zeros(700, 8)}}
    return state


@pytest.mark.parametrize("how", ["plain", "parallel", "bare backbone", "kinetics"])
def test_files_under_several_names(tmp_path, how):
    model = awake(small())
    torch.save(spelled(model.state_dict(), how), tmp_path / "w.pth")
    got = sf.load(tmp_path / "w.pth", SMALL, IA, groups=GROUPS, no_head=how in ("bare backbone", "kinetics"))
    for k, v in model.backbone.state_dict().items():
        assert torch.equal(v, got.backbone.state_dict()[k]), k
    assert got.loaded.whole == (how in ("plain", "parallel"))
    assert got.loaded.left_over == (["cls_head.pred.weight"] if how == "kinetics" else [])


def test_structure_is_read_from_the_file():
    for kind in ("dense", "serial", "parallel"):
        state = small(replace(IA, structure=kind)).state_dict()
        assert sf.interaction_of(sf.plain_names(state)).structure == kind
    assert sf.interaction_of(sf.plain_names(small(None).state_dict())) is None


def test_other_networks_are_refused(tmp_path):
    torch.save(small(None).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="no_head"):
        sf.load(tmp_path / "w.pth", SMALL, "", groups=GROUPS[:1])
    sf.load(tmp_path / "w.pth", SMALL, "", groups=GROUPS[:1], no_head=True)
    with pytest.raises(InputError, match="lacks"):
        sf.load(tmp_path / "w.pth", replace(SMALL, depths=(1, 2, 1, 1)), "", groups=GROUPS)
    with pytest.raises(InputError, match="no weight of a SlowFast backbone"):
        sf.load({"other.weight": torch.zeros(2)}, SMALL, "", groups=GROUPS)
    with pytest.raises(InputError, match="r101_8x8"):
        sf.load(small(None).state_dict(), "r50", groups=GROUPS)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_hostile_files_run_nothing(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(mark)))
    torch.save({"model": Evil(mark)}, tmp_path / "zip.pth")
    good = io.BytesIO()
    torch.save(small(None).state_dict(), good)
    (tmp_path / "cut.pth").write_bytes(good.getvalue()[:5000])
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as z:
        z.writestr("data.pkl", pickle.dumps(Evil(mark)))
    for name in ("raw", "zip", "cut", "other"):
        with pytest.raises(InputError):
            sf.load(tmp_path / f"{name}.pth", SMALL, "", groups=GROUPS)
    assert not mark.exists()


def test_pickled_memory_of_a_training_is_passed_over(tmp_path):
    "Files saved while training hold a pickled class; the weights are read all the same."
    mod = type(sys)("alphaction_like")
    sys.modules[mod.__name__] = mod
    pool = type("MemoryPool", (), {"__module__": mod.__name__, "__qualname__": "MemoryPool"})
    mod.MemoryPool = pool
    it = pool()
    it.cache = {"film": {1: torch.zeros(2)}}
    try:
        torch.save({"model": spelled(small(None).state_dict(), "parallel")["model"], "person_pool": it,
                    "iteration": 7}, tmp_path / "model_0000007.pth")
    finally:
        del sys.modules[mod.__name__]
    assert sf.load(tmp_path / "model_0000007.pth", SMALL, "", groups=GROUPS).loaded.whole


def test_persons_answer_for_themselves():
    "Another order of boxes, another batch: the same scores."
    model = awake(small())
    a, b = clip(1, 4), clip(2, 3)
    with torch.inference_mode():
        want = model(a["slow"], a["fast"], a["boxes"], sizes=a["sizes"]).scores
        turn = torch.tensor([2, 0, 3, 1])
        got = model(a["slow"], a["fast"], [a["boxes"][0][turn]], sizes=a["sizes"]).scores
        both = model(*(torch.cat([a[k], b[k]]) for k in ("slow", "fast")), a["boxes"] + b["boxes"],
                     sizes=a["sizes"] * 2).scores
    # memory holds two of a second: the first two, so the order tells there
    alone = awake(small(replace(IA, blocks=("P", "O", "P"))))
    with torch.inference_mode():
        x = alone(a["slow"], a["fast"], a["boxes"], sizes=a["sizes"]).scores
        y = alone(a["slow"], a["fast"], [a["boxes"][0][turn]], sizes=a["sizes"]).scores
    assert torch.allclose(x[turn], y, atol=1e-5)
    assert torch.allclose(both[:4], want, atol=1e-5)
    assert not torch.allclose(want[turn], got, atol=1e-6)


def test_crowds_are_taken_by_rule_or_by_seed():
    model, c = awake(small()), clip(1, 6)
    run = lambda rng=None: model(c["slow"], c["fast"], c["boxes"], sizes=c["sizes"], rng=rng).scores
    with torch.inference_mode():
        assert torch.equal(run(), run())
        draws = [run(torch.Generator().manual_seed(s)) for s in (1, 1, 2, 3)]
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], d) for d in draws[2:])


def test_memory_counts_and_the_present_is_the_clip():
    model, c, pool = awake(small()), clip(10), MemoryPool()
    with torch.inference_mode():
        def scores(): return model(c["slow"], c["fast"], c["boxes"], sizes=c["sizes"],
                                   memory=[pool.window("film", 10, model.config.ia)]).scores
        empty = scores()
        pool.put("film", 10, torch.ones(2, SMALL.dim) * 9)
        pool.put("film", 13, torch.ones(2, SMALL.dim) * 9)
        assert torch.equal(scores(), empty)  # the present and beyond the window
        pool.put("film", 11, torch.ones(2, SMALL.dim) * 9)
        assert not torch.allclose(scores(), empty, atol=1e-4)


def test_an_empty_clip_beside_others():
    model, a = awake(small()), clip(1)
    with torch.inference_mode():
        got = model(torch.cat([a["slow"]] * 2), torch.cat([a["fast"]] * 2), [a["boxes"][0][:0], a["boxes"][0]],
                    sizes=a["sizes"] * 2)
        want = model(a["slow"], a["fast"], a["boxes"], sizes=a["sizes"])
    assert got.counts == [0, 2]
    assert torch.allclose(got.scores, want.scores, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 5))
def test_the_loss_of_parts_adds_up(seed, a, b):
    "Accumulated batches give the loss of the whole step."
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((a + b, 3))).float()
    y = torch.from_numpy(rng.integers(0, 2, (a + b, 3)))
    whole = action_loss(x, y, GROUPS)["total_loss"]
    parts = sum(action_loss(x[s], y[s], GROUPS, boxes=a + b)["total_loss"] for s in (slice(a), slice(a, None)))
    assert torch.allclose(whole, parts, rtol=1e-5)


def test_an_empty_file_is_told_so(tmp_path):
    for name in ("w.pth", "w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match="not readable") as e:
            sf.load(tmp_path / name, SMALL, "", groups=GROUPS)
        assert name in str(e.value)
    model = small(None)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "crowdlens.json").write_text(json.dumps(dict(kind="actions", config=model.config.to_dict())))
    save_file(model.state_dict(), folder / "model.safetensors")
    assert sf.load_folder(folder).loaded.whole
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:len(raw) // 2])
    with pytest.raises(InputError, match="not readable"):
        sf.load_folder(folder)


def test_a_loss_that_is_no_number_keeps_its_batch(tmp_path):
    t = training.Trainer(small(), training.Recipe(lr=.05, warmup=0, max_iter=9), shake=False, keep=tmp_path)
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    bad = clip(1)
    bad["fast"] = bad["fast"] * float("nan")
    with pytest.raises(InputError, match="loss of step 0 is nan; its key frames: film 1"):
        t.step([bad])
    kept = torch.load(tmp_path / "bad_batch_0.pt", weights_only=True)
    assert torch.isnan(kept["fast"]).all() and kept["keys"] == [("film", 1)]
    assert all(torch.equal(v, before[k]) for k, v in t.model.state_dict().items())


def test_a_group_may_be_empty():
    groups = (GROUPS[0], Group("nothing", 0, False, 0.0), GROUPS[1])
    t = training.Trainer(small(None, groups), training.Recipe(lr=.05, warmup=0, max_iter=9), shake=False)
    got = t.step([clip(1)])
    assert got["loss_nothing"] == 0 and np.isfinite(got["total_loss"])


@pytest.mark.parametrize("name", ["resnet50_4x16f_baseline", "resnet50_4x16f_denseserial", "resnet50_4x16f_serial",
                                  "resnet50_4x16f_parallel", "resnet101_8x8f_baseline", "resnet101_8x8f_denseserial"])
def test_released_settings_are_read(shared, tmp_path, name):
    "A file in the published dialect for each released configuration, and its network."
    flat = json.loads((shared / "golden/slowfast/configs.json").read_text())["configs"][name]
    tree = {}
    for key, v in flat.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = str(tuple(v)) if isinstance(v, list) and "BLOCK" not in key else v
    (tmp_path / "c.yaml").write_text(json.dumps(tree))  # JSON is YAML
    got = from_alphaction_yaml(tmp_path / "c.yaml")
    deep, ia = "101" in name, name.split("_")[-1].replace("baseline", "").replace("denseserial", "dense")
    assert got.get("arch", "r50_4x16") == ("r101_8x8" if deep else "r50_4x16") and got.get("ia", "") == ia
    assert (got["max_iter"], got["steps"]) == ((110_000, [70_000, 90_000]) if ia else (90_000, [50_000, 70_000]))
    cfg = stage.Config(**{k: v for k, v in got.items()} | dict(data="x"))
    r = stage.recipe_of(cfg)
    assert (r.lr, r.ia_lr, r.warmup, r.clips) == (4e-4, 10 if ia else 1, 2000, 16)
    with pytest.raises(InputError, match="did you mean 'MODEL.ROI_ACTION_HEAD.NUM_CLASSES'"):
        from_alphaction_yaml(tmp_path / "c.yaml", ["MODEL.ROI_ACTION_HEAD.NUM_CLASS", "3"])
    with pytest.raises(InputError, match="should be like"):
        from_alphaction_yaml(tmp_path / "c.yaml", ["SOLVER.MAX_ITER", "long"])
