"""Two processes (gloo) train as one does at the same global batch; a state is read by any number of them."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_worker
from safetensors.torch import load_file
from train_worker import SETTINGS, SMALL, generator_settings, refiner_settings

from vft.train import generator, parallel, refiner, tokenizer
from vft.train.loop import Engine
from vft.train.state import read_log

# relative: sums over the batch in another order, and Adam's quotient of them
TOLERANCE = 1e-4


def start(folder: Path, ranks: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, train_worker.__file__, str(folder)]
    environments = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env=environment, **pipes) for environment in environments]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one process in ``one``, ``generator_one`` and ``refiner_one``, of two in the others."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    tokenizer.train(folder / "one", SETTINGS, config=SMALL)
    tokenizer.train(folder / "resumed", SETTINGS, config=SMALL, minutes=0)
    processes = start(folder, 2)
    generator.train(folder / "generator_one", generator_settings(folder))
    refiner.train(folder / "refiner_one", refiner_settings(folder))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder)]


@pytest.mark.parametrize(
    ("run", "alone"),
    [("ddp", "one"), ("fsdp", "one"), ("resumed", "one"), ("generator_ddp", "generator_one"),
     ("generator_fsdp", "generator_one"), ("refiner_ddp", "refiner_one"), ("refiner_fsdp", "refiner_one")],
)  # fmt: skip
def test_two_processes_repeat_the_losses_of_one(runs, run, alone):
    assert len(losses(runs / run)) == SETTINGS.steps
    assert losses(runs / run) == pytest.approx(losses(runs / alone), rel=TOLERANCE)
    one, two = (load_file(runs / folder / "state.safetensors") for folder in (alone, run))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.shape == two[name].shape, name
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("mode", parallel.MODES)
def test_a_state_of_two_processes_goes_on_in_one(runs, tmp_path, mode):
    shutil.copytree(runs / mode, tmp_path / mode)
    longer = replace(SETTINGS, steps=5)
    tokenizer.train(tmp_path / mode, longer, config=SMALL)
    shutil.copytree(runs / "one", tmp_path / "one")
    tokenizer.train(tmp_path / "one", longer, config=SMALL)
    assert losses(tmp_path / mode)[3:] == pytest.approx(losses(tmp_path / "one")[3:], rel=TOLERANCE)


def test_a_mode_needs_torchrun_and_equal_parts(tmp_path):
    with pytest.raises(ValueError, match="torchrun"):
        tokenizer.train(tmp_path, SETTINGS, config=SMALL, engine=Engine(parallel="fsdp"))
    with pytest.raises(ValueError, match="batch 4 must be a multiple of 1 processes x 3 accumulations"):
        tokenizer.train(tmp_path, SETTINGS, config=SMALL, engine=Engine(accumulate=3))
    group = parallel.Group(torch.device("cpu"), rank=1, size=2)
    assert group.parts(8, 2) == [slice(4, 6), slice(6, 8)]
