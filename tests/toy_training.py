"""A toy stage that trains, and kills itself where the environment says:
KILL=before (the first checkpoint), mid (in the second epoch), write (while
the second checkpoint is being written), full (the disk is)."""
import os
import signal
import sys
from dataclasses import dataclass

import numpy as np
import torch

from crowdlens.core import runs
from crowdlens.core.config import Config, schedule

KILL = os.environ.get("KILL", "")


def die(where):
    if where and where == KILL:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(kw_only=True)
class Toy(Config):
    "A linear model on noise, with dropout, so that random states matter."
    epochs: int = schedule(3)  # passes
    lr: float = 0.1  # learning rate


def train(cfg):
    with runs.Run("00_toy", cfg) as run:
        if run.done:
            return run.done
        runs.seed_all(cfg.seed)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        opt = torch.optim.AdamW(net.parameters(), cfg.lr)
        begin = 0
        if got := run.resume():
            weights, state = got
            net.load_state_dict(weights)
            opt.load_state_dict(state["opt"])
            begin = state["epoch"]
        for epoch in range(begin + 1, cfg.epochs + 1):
            for step in range(4):
                x = torch.from_numpy(np.random.randn(16, 4).astype("f"))
                loss = net(x).square().mean() + (net(x).mean() - 1).square()
                opt.zero_grad()
                loss.backward()
                opt.step()
                if step == 1:
                    die("before" if epoch == 1 else "mid" if epoch == 2 else "")
            run.track(epoch, loss=loss.item())
            if epoch == 2 and KILL in ("write", "full"):
                runs.os.rename = broken
            state = dict(opt=opt.state_dict(), epoch=epoch)
            run.save(f"epoch-{epoch:04}", net.state_dict(), dict(kind="toy"), state, best=-loss.item())
        w = torch.cat([p.detach().flatten() for p in net.parameters()])
        return run.finish(dict(loss=loss.item(), norm=w.norm().item()), key=["loss"])


def broken(*a):
    die("write")
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        print(train(Toy(out=sys.argv[1], name="t", epochs=int(sys.argv[2]))).metrics)
    except runs.InputError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
