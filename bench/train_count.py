"""What a GPU is given in a step of the training of a new tokenizer: operations that the host starts, and bytes that
they move, counted on the CPU; and how long one core draws the choices of a clip.

python bench/train_count.py [--batch 8 --recipe 1]
"""

import argparse
import pickle
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vft.config import make_config
from vft.profiling import footprint
from vft.train import procedural, render
from vft.train.loop import Engine, Trainer
from vft.train.parallel import Group
from vft.train.tokenizer import TINY, TokenizerSettings, TokenizerTask


class Count(TorchDispatchMode):
    """Operations other than views, and the bytes of what they read and write."""

    def __init__(self):
        super().__init__()
        self.ops, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and not function._schema.name.startswith("aten::empty"):
            self.ops += 1
            self.bytes += footprint([x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)])
        return out


def counted(what: str, batch: int, call) -> None:
    with Count() as count:
        call()
    print(f"{what}: {count.ops} operations, {count.ops / batch:.0f} a clip; {count.bytes / batch / 1e6:.0f} MB a clip")


def drawing(plans: int, recipe: int) -> None:
    seconds, size = [], 0
    for i in range(plans):
        start = time.perf_counter()
        plan = procedural.plan(1, i, recipe=recipe)
        seconds.append(time.perf_counter() - start)
        size += len(pickle.dumps(plan))
    print(f"drawing: {1e3 * statistics.mean(seconds):.1f} ms of a core, {size / plans / 1e6:.2f} MB a clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--recipe", type=int, default=1, choices=procedural.RECIPES)
    options = parser.parse_args()
    drawing(64, options.recipe)
    plans = [procedural.plan(0, i, recipe=options.recipe) for i in range(options.batch)]
    # as a GPU gets them: `render.one` leaves out what the host knows to be off
    counted("rendering", options.batch, lambda: render.together(plans, torch.device("cpu")))
    settings = TokenizerSettings(batch=options.batch, clips=options.batch, recipe=options.recipe)
    task = TokenizerTask(settings, make_config(**TINY))
    trainer = Trainer(settings, task, Engine(), Group(torch.device("cpu")))
    # afterwards all clips are encoded, and the optimisers have their moments
    task.data.batch(range(options.batch))
    trainer.step(0)
    counted("the rest of a step", options.batch, lambda: trainer.step(1))


if __name__ == "__main__":
    main()
