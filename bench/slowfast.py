"""Forward of SlowFast-R50-4x16 on the CPU: crowdlens beside a naive composition.

`python bench/slowfast.py [height width runs]`: one clip of 64 frames, five
persons. The naive side is the same network with torch's own 3-D convolutions
on tensors as they come, and batch norm as a layer of its own. Without
arguments the figures go to bench/results/slowfast.json."""
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

from crowdlens.models import slowfast as sf
from crowdlens.models import slowfast_pathways as sp


def clock(model, args, runs):
    "Best CPU seconds of a forward, and its logits."
    best = float("inf")
    for _ in range(runs):
        t = time.process_time()
        with torch.inference_mode():
            out = model(*args[:3], sizes=args[3])
        best = min(best, time.process_time() - t)
    return best, out.logits


def main(height=256, width=464, runs=3):
    torch.set_num_threads(1)
    model = sf.fresh(sf.ActionConfig()).eval()
    torch.manual_seed(0)
    fast = torch.randn(1, 3, 32, height, width)
    boxes = [[[20 + 40 * i, 20, 90 + 40 * i, height - 20] for i in range(5)]]
    args = fast[:, :, 4::8].contiguous(), fast, boxes, [(height, width)]
    quick = sp.fused(model)
    ours, a = clock(quick, args, runs)
    split = sp.SplitConv.forward
    sp.SplitConv.forward = nn.Conv3d.forward
    try:
        naive, b = clock(model, args, runs)
    finally:
        sp.SplitConv.forward = split
    row = dict(what="SlowFast-R50-4x16 forward", size=f"{width}x{height}", torch=torch.__version__, threads=1,
               crowdlens_cpu_s=round(ours, 3), naive_cpu_s=round(naive, 3), ratio=round(naive / ours, 2),
               largest_difference=float((a - b).abs().max()))
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    row = main(*map(int, sys.argv[1:]))
    if not sys.argv[1:]:
        row |= dict(date=datetime.date.today().isoformat(), cpus=os.cpu_count(), machine=platform.machine(),
                    load=round(os.getloadavg()[0], 1))
        (Path(__file__).parent / "results/slowfast.json").write_text(json.dumps(row, indent=1) + "\n")
