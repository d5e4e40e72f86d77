"""One process of a group that test_parallel_runs.py starts: trains small models into the folder given."""

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch.distributed as dist

from vft.config import make_config
from vft.train import generator, refiner, tokenizer
from vft.train.generator import GeneratorSettings
from vft.train.loop import Engine, Settings
from vft.train.refiner import RefinerSettings
from vft.train.tokenizer import TokenizerSettings

SMALL = make_config(
    encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, registers=4, codec="linear",
    levels=(4, 4, 4), size=16,
)  # fmt: skip
SETTINGS = TokenizerSettings(steps=3, batch=4, clips=9, warmup=2, bf16=False, frames=(5, 17))

# those that every kind of run has
COMMON = {field.name: getattr(SETTINGS, field.name) for field in fields(Settings)}


def generator_settings(folder: Path) -> GeneratorSettings:
    return GeneratorSettings(**COMMON, tokenizer=f"{folder}/one/model.safetensors", depth=1, tokens_per_frame=2)


def refiner_settings(folder: Path) -> RefinerSettings:
    return RefinerSettings(**COMMON | {"optimizer": "adamw"}, tokenizer=f"{folder}/one/model.safetensors")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for mode in ("ddp", "fsdp"):
        engine = Engine(parallel=mode)
        tokenizer.train(folder / mode, SETTINGS, config=SMALL, engine=engine)
        generator.train(folder / f"generator_{mode}", generator_settings(folder), engine=engine)
        refiner.train(folder / f"refiner_{mode}", refiner_settings(folder), engine=engine)
    # a run of one process goes on sharded, in two accumulated halves, with recomputed activations
    engine = Engine(parallel="fsdp", accumulate=2, checkpoint=True)
    tokenizer.train(folder / "resumed", replace(SETTINGS, steps=3), config=SMALL, engine=engine)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # all is on disk; torch has once aborted while it took its threads down at exit
    os._exit(0)
