"""Run by test_slowfast under torchrun: three steps of a toy, a clip a rank."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

import test_slowfast as toy  # noqa: E402
from crowdlens.models import action_training as training  # noqa: E402

torch.set_num_threads(1)
acc = Accelerator(cpu=True)
recipe = training.Recipe(lr=.05, warmup=2, max_iter=9, steps=(7,))
t = training.Trainer(toy.small(), recipe, shake=False, acc=acc)
for k in range(3):
    mine = [toy.clip(2 * k), toy.clip(2 * k + 1, 3)][acc.process_index]
    last = t.step([mine])
assert len(t.pool) == 6, "every rank remembers what all have seen"
if acc.is_main_process:
    torch.save(dict(last, model=t.model.state_dict(), seconds=sorted(s for _, s in t.pool.entries),
                    fifth=t.pool.get("film", 5)[0]), sys.argv[1])
acc.end_training()
