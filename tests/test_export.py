"""ONNX files of every kind of detector, through the command."""
import json

import numpy as np
import pytest

from crowdlens.core.coco import LabelMap
from crowdlens.core.files import InputError
from crowdlens.core.letterbox import Letterbox
from crowdlens.models import checkpoints
from crowdlens.models.detector import Detector, save_hugging_face
from crowdlens.models.detr_beyond import build_beyond
from crowdlens.models.export import export

pytest.importorskip("onnxruntime")
SMALL = dict(num_queries=12, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)


@pytest.fixture(scope="module", params=["plain", "beyond"])
def checkpoint(request, tmp_path_factory):
    "A checkpoint of stage 03: a DETR on DINOv3, and one with all that a plain one lacks."
    more = dict(blocks=[1, 2], group_norm=True, two_stage=True, refine=True) if request.param == "beyond" else {}
    net = build_beyond("tiny", ["person", "head"], **more, **SMALL).eval()
    ck = checkpoints.Checkpoint(net, LabelMap.make({1: "person", 2: "head"}), Letterbox(96, 160), (.485, .456, .406),
                                (.229, .224, .225))
    folder = tmp_path_factory.mktemp(request.param) / "best"
    save_hugging_face(ck, folder)
    return folder


def test_a_detr_is_exported_by_the_command(checkpoint, tmp_path, capsys):
    from crowdlens import cli
    cli.app(["export", str(checkpoint), "--out", str(tmp_path / "o")], standalone_mode=False)
    assert "model.onnx" in capsys.readouterr().out
    info = json.loads((tmp_path / "o" / "model.json").read_text())
    assert max(info["difference"]["logits"], info["difference"]["boxes"]) <= 1e-4
    rng = np.random.default_rng(0)
    pics = [rng.integers(0, 255, s, np.uint8) for s in ((60, 90, 3), (96, 160, 3), (100, 40, 3))]
    a = Detector(checkpoint, device="cpu").detect(pics, batch=3)
    b = Detector(checkpoints.open(tmp_path / "o" / "model.onnx"), device="cpu").detect(pics, batch=3)
    for x, y in zip(a, b):
        assert np.allclose(x[1], y[1], atol=1e-4) and np.allclose(np.sort(x[0], 0), np.sort(y[0], 0), atol=.05)


def test_requests_that_cannot_be_met_leave_nothing(checkpoint, tmp_path):
    for kw, why in ((dict(opset=11), "(?s)operator set 11.*17 to 20"), (dict(opset=30), "operator set 30"),
                    (dict(size=(100, 160)), "(?s)100x160.*multiples of 32: 128x160"), (dict(size=0), "0x0")):
        with pytest.raises(InputError, match=why):
            export(checkpoint, tmp_path / "o", **kw)
        assert not list(tmp_path.rglob("*"))
