"""Run by test_actions_stage under torchrun, two processes: three steps of a
toy, the stage's evaluation and prediction, and a training in whose third step
the second process is killed."""
import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

import test_slowfast as toy  # noqa: E402
from crowdlens import slowfast_finetune as stage  # noqa: E402
from crowdlens.core.action_data import ActionClips  # noqa: E402
from crowdlens.models import action_training as training  # noqa: E402

torch.set_num_threads(1)
out, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
acc = Accelerator(cpu=True)
recipe = training.Recipe(lr=.05, warmup=2, max_iter=9, steps=(7,))
people = {("film", k): 3 for k in range(6)}
t = training.Trainer(toy.small(), recipe, shake=False, acc=acc, people=people)
grads, step = [], t.opt.step
t.opt.step = lambda: (grads.append({k: p.grad.clone() for k, p in t.model.named_parameters()}), step())
for k in range(3):
    mine = [toy.clip(2 * k), toy.clip(2 * k + 1, 3)][acc.process_index]
    last = t.step([mine])
assert len(t.pool) == 6, "every rank remembers what all have seen"
assert t.pool.writer == acc.is_main_process, "one process writes the pool of a machine"
if acc.is_main_process:
    torch.save(dict(last, model=t.model.state_dict(), seconds=sorted(s for _, s in t.pool.entries),
                    fifth=t.pool.get("film", 5)[0], grads=grads[0]), out / "two.pt")

read = []
item = ActionClips.__getitem__
ActionClips.__getitem__ = lambda self, i: (read.append(self.frames[i].key), item(self, i))[1]
opened, plain = [], open
stage.open = lambda path, mode="r", **k: (opened.append(str(path)), plain(path, mode, **k))[1]
for name in ("evaluate", "predict"):
    read.clear()
    stage.run(stage.Config(**runs[name]))
    (out / f"{name}-{acc.process_index}.json").write_text(json.dumps(dict(read=read, opened=opened)))
ActionClips.__getitem__ = item

go = training.Trainer.step


def until(self, batches):
    if self.iteration == 2 and acc.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return go(self, batches)


training.Trainer.step = until
stage.run(stage.Config(**runs["train"]))
