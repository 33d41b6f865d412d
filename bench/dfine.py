"""D-FINE's criterion beside transformers' own loss: forward and backward of the
loss alone, on the raw outputs of a D-FINE-L for one picture with 100 objects
and 640x640 pixels (8400 places, 300 and 200 denoising queries), random weights.
`PART=dfine make bench`; one core."""
import statistics
import time

import torch
from transformers import DFineForObjectDetection

from crowdlens.core.class_names import COCO_NAMES
from crowdlens.models import dfine
from crowdlens.models.dfine_criterion import DFineCriterion, published_denoising

torch.set_num_threads(1)
NAMES = {"logits": "intermediate_logits", "boxes": "intermediate_reference_points",
         "corners": "intermediate_predicted_corners"}


def outputs(model, pixels, labels):
    "Raw outputs, cut off from the network: what a loss is given."
    with torch.no_grad(), published_denoising():
        out = model.model(pixels, labels=labels)
    for k in (*NAMES.values(), "enc_topk_logits", "enc_topk_bboxes"):
        out[k] = out[k].detach().requires_grad_()
    return out


def theirs(model, out, labels):
    loss, _, _ = model.loss_function(
        out.intermediate_logits[:, -1], labels, torch.device("cpu"), out.intermediate_reference_points[:, -1],
        model.config, out.intermediate_logits, out.intermediate_reference_points, enc_topk_logits=out.enc_topk_logits,
        enc_topk_bboxes=out.enc_topk_bboxes, denoising_meta_values=out.denoising_meta_values,
        predicted_corners=out.intermediate_predicted_corners, initial_reference_points=out.initial_reference_points)
    return loss


def main(size="l", batch=1, objects=100, rounds=5):
    torch.manual_seed(0)
    model = DFineForObjectDetection(dfine.size_config(size, COCO_NAMES)).train()
    labels = [dict(class_labels=torch.randint(0, 80, (objects,)), boxes=torch.rand(objects, 4) * .3 + .2)
              for _ in range(batch)]
    pixels = torch.rand(batch, 3, 640, 640)
    t = time.process_time()
    out = outputs(model, pixels, labels)
    forward = time.process_time() - t
    crit = DFineCriterion(model.config)
    ways = dict(crowdlens=lambda: sum(crit(out, labels).values()), transformers=lambda: theirs(model, out, labels))
    times = {k: [] for k in ways}
    for _ in range(rounds):
        for k, f in ways.items():
            t = time.process_time()
            f().backward()
            times[k].append(time.process_time() - t)
    mid = {k: statistics.median(v) for k, v in times.items()}
    ratio = mid["transformers"] / mid["crowdlens"]
    print(f"D-FINE-{size}, 640x640, batch {batch}, {objects} objects, CPU seconds (median of {rounds}): "
          f"forward {forward:.2f}; loss and its gradient: crowdlens {mid['crowdlens']:.3f}, "
          f"transformers {mid['transformers']:.3f}: {ratio:.1f} times as fast")
    return mid | {"forward": forward, "times as fast": ratio}


if __name__ == "__main__":
    main()
