"""A run that is disturbed: killed, out of disk space, fed with NaN, resumed otherwise; and its log and plot."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_worker import SETTINGS, SMALL

import vft
from vft import cli, plots
from vft.config import parse_config
from vft.train import state
from vft.train import tokenizer as trainer
from vft.train.loop import Engine
from vft.train.loss import draw, flow_loss
from vft.train.tokenizer import train

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
from train_worker import SETTINGS, SMALL
from vft.train.loop import Engine
from vft.train.tokenizer import train
settings, engine = replace(SETTINGS, steps=400), Engine(save_seconds=0)
train(Path(sys.argv[1]), settings, config=SMALL, engine=engine)
"""


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in state.read_log(folder)]


def test_a_killed_run_resumes_with_the_same_losses(tmp_path):
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # from elsewhere, so that the installed package is meant and not this folder
    command = [sys.executable, "-c", WORKER, str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path)
    log = tmp_path / "killed" / state.LOG
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    settings = replace(SETTINGS, steps=400)
    # what a kill in the middle of a save leaves behind
    (tmp_path / "killed" / ".0123456789ab.tmp").write_bytes(b"half")
    before = len(losses(tmp_path / "killed"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            train(tmp_path / "killed", settings, config=SMALL, minutes=0)
        again = losses(tmp_path / "killed")
        assert before <= len(again) < settings.steps
        engine = Engine(save_seconds=1e9)
        with pytest.raises(KeyboardInterrupt):
            stop_after(len(again), lambda: train(tmp_path / "whole", settings, config=SMALL, engine=engine))
    finally:
        torch.set_num_threads(threads)
    assert losses(tmp_path / "whole") == again
    assert not list((tmp_path / "killed").glob(".*.tmp"))


def test_processes_that_render_give_the_same_losses(tmp_path):
    settings = replace(SETTINGS, steps=4, clips=12)
    for name, workers in (("threads", 0), ("processes", 2)):
        train(tmp_path / name, settings, config=SMALL, engine=Engine(workers=workers))
    assert losses(tmp_path / "threads") == losses(tmp_path / "processes")
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        train(tmp_path / "none", settings, config=SMALL, engine=Engine(workers=-1))


WORKERS = """
import os, signal, time
from multiprocessing import forkserver
from vft.train.data import Clips, Procedural, Shapes
if __name__ == "__main__":
    clips = Clips(list, Procedural(0, Shapes(0, (5,), (16,))))
    # default_int_handler, or SIG_IGN where the tests run in the background
    before = signal.getsignal(signal.SIGINT)
    clips.start_workers(2)
    # from its first moment: it imports for seconds, and Ctrl-C comes to all processes
    status = open(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read()
    assert int(status.split("SigIgn:")[1].split()[0], 16) & 1 << signal.SIGINT - 1
    assert signal.getsignal(signal.SIGINT) is before
    assert len(clips.batch(range(9, 17))) == 8
    (first, second) = clips._pool._processes
    os.kill(first, signal.SIGINT)
    os.kill(second, signal.SIGINT)
    # Ctrl-C is the run's to answer: both still render
    assert len(clips.batch(range(1, 9))) == 8
    print(first, second, flush=True)
    time.sleep(600)
"""


def test_processes_that_render_end_with_their_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(WORKERS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, script], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    workers = [int(word) for word in run.stdout.readline().split()]
    assert len(workers) == 2 and all(_alive(pid) for pid in workers)
    run.kill()
    # its pipe stays open as long as a worker lives
    run.wait()
    run.stdout.close()
    end = time.time() + 30
    while time.time() < end and any(map(_alive, workers)):
        time.sleep(0.05)
    left = [pid for pid in workers if _alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stop_after(steps: int, run) -> None:
    """Interrupts a run after so many steps."""
    count, loss = 0, trainer.TokenizerTask.loss

    def counted(*args, **options):
        nonlocal count
        if count == steps:
            raise KeyboardInterrupt
        count += 1
        return loss(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.TokenizerTask, "loss", counted)
        run()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(tmp_path, monkeypatch, capsys, number, code):
    small = {"codec": "linear", "encoder_width": 32, "decoder_width": 32, "head_dim": 32, "registers": 2, "size": 16}
    loss = trainer.TokenizerTask.loss

    def interrupted(task, generator, part):
        if generator.initial_seed() == 1:
            os.kill(os.getpid(), number)
        return loss(task, generator, part)

    monkeypatch.setattr(trainer, "TINY", small)
    monkeypatch.setattr(trainer.TokenizerTask, "loss", interrupted)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    words = ["train", "tokenizer", "-o", str(tmp_path / "run"), "--steps", "9", "--batch", "1", "--clips", "2"]
    # a process started in the background may have been told to ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(words) == code
    finally:
        signal.signal(signal.SIGINT, handlers[0])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    out, err = capsys.readouterr()
    assert "stopping after this step" in err
    assert f"stopped at step 2; the same command goes on from {tmp_path / 'run' / state.STATE}" in out
    assert f"{tmp_path / 'run' / state.MODEL}: step 2 of 9. Next: vft reconstruct" in out
    assert len(losses(tmp_path / "run")) == 2
    monkeypatch.setattr(trainer.TokenizerTask, "loss", loss)
    assert cli.main(words) == 0 and len(losses(tmp_path / "run")) == 9


def test_a_full_disk_keeps_the_last_state(tmp_path):
    train(tmp_path, SETTINGS, config=SMALL, minutes=0)
    before = (tmp_path / state.STATE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a file that grows beyond this fails as on a full disk; the log is smaller
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot be saved .*the last saved state is unharmed"):
            train(tmp_path, SETTINGS, config=SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / state.STATE).read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
    train(tmp_path, SETTINGS, config=SMALL)
    train(tmp_path / "whole", SETTINGS, config=SMALL)
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_outputs_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, reason in ((tmp_path / "file", "must be a folder"), (tmp_path / "file" / "run", "cannot be made")):
        assert cli.main(["train", "-o", str(output), "--steps", "1", "--batch", "1", "--clips", "1"]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


def test_a_model_of_somebody_else_is_left(tmp_path):
    (tmp_path / state.MODEL).write_text("mine")
    with pytest.raises(OSError, match=r"holds a model\.safetensors that no training made"):
        train(tmp_path, SETTINGS, config=SMALL)
    assert [p.name for p in tmp_path.iterdir()] == [state.MODEL] and (tmp_path / state.MODEL).read_text() == "mine"


def test_other_settings_and_models_are_named(tmp_path):
    train(tmp_path, replace(SETTINGS, steps=1), config=SMALL)
    with pytest.raises(ValueError, match=r"made with batch 4 \(now 2\), frames \[5, 17\] \(now \[5\]\)"):
        train(tmp_path, replace(SETTINGS, batch=2, frames=(5,)), config=SMALL)
    other = json.loads(json.dumps(SMALL))
    other["video_flex_tok"]["regularizer"]["levels"] = [8, 8, 8]
    with pytest.raises(ValueError, match=r"levels \[4, 4, 4\] \(now \[8, 8, 8\]\)"):
        train(tmp_path, replace(SETTINGS, steps=2), config=other)
    (tmp_path / state.STATE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"state\.safetensors must be a complete safetensors file"):
        train(tmp_path, replace(SETTINGS, steps=2), config=SMALL)


def test_a_loss_that_is_not_finite_leaves_its_batch_and_state(tmp_path, monkeypatch):
    train(tmp_path, SETTINGS, config=SMALL, minutes=0)
    before = load_file(tmp_path / state.STATE)
    monkeypatch.setattr(trainer, "flow_loss", lambda model, *_: model.encoder.head.bias.sum() * float("inf"))
    with pytest.raises(RuntimeError, match=r"the loss is (nan|inf) at step 1 .*batch \[\d+, \d+, \d+, \d+\]"):
        train(tmp_path, SETTINGS, config=SMALL)
    facts = json.loads((tmp_path / "failed.json").read_text())
    assert facts["step"] == 1 and len(facts["indices"]) == SETTINGS.batch
    failed, after = load_file(tmp_path / "failed.safetensors"), load_file(tmp_path / state.STATE)
    for name, value in before.items():
        assert torch.equal(value, failed[name]) and torch.equal(value, after[name]), name


def model_and_ragged():
    torch.manual_seed(1)
    model = vft.Tokenizer(parse_config(SMALL)).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    shapes = [(16, 5, 2, 2), (16, 1, 2, 2), (16, 3, 4, 2), (16, 5, 2, 4)]
    return model, [torch.randn(shape) for shape in shapes]


def gradients(model, latents, first=0, batch=None):
    choices = draw(
        latents,
        model.registers,
        torch.Generator().manual_seed(2),
        corruption=0.3,
        codebook=64,
        batch=batch,
        first=first,
    )
    model.zero_grad()
    flow_loss(model, latents, choices).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_ragged_batch_is_the_mean_of_its_clips():
    model, latents = model_and_ragged()
    whole = gradients(model, latents)
    alone = [gradients(model, [x], first=i, batch=len(latents)) for i, x in enumerate(latents)]
    torch.testing.assert_close(whole, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients():
    model, latents = model_and_ragged()
    kept = gradients(model, latents)
    model.encoder.recompute = model.decoder.recompute = True
    assert torch.equal(gradients(model, latents), kept)


def test_corruption_replaces_that_share_of_codes():
    latents = [torch.zeros(1, 5, 1, 1)] * 500
    hit, ids = draw(latents, 4, torch.Generator().manual_seed(0), corruption=0.2, codebook=64).replaced
    assert hit.shape == ids.shape == (10_000,) and 0.18 < hit.float().mean() < 0.22
    assert (ids.min(), ids.max()) == (0, 63)


def test_the_plot(tmp_path, monkeypatch, capsys):
    (tmp_path / state.LOG).write_text("".join(
        json.dumps({"step": i + 1, "loss": 1 / (i + 1), "clips_per_second": 3.0}) + "\n" for i in range(60)
    ) + '{"step": 6')  # fmt: skip
    assert len(state.read_log(tmp_path)) == 60
    assert plots.running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    output = tmp_path / "loss.png"
    assert cli.main(["train", "--plot", str(tmp_path / "nothing"), "-o", str(output)]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
    if importlib.util.find_spec("matplotlib"):
        assert cli.main(["train", "--plot", str(tmp_path), "-o", str(output)]) == 0
        assert output.read_bytes().startswith(b"\x89PNG")
        output.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["train", "--plot", str(tmp_path), "-o", str(output)]) == 2
    assert "flexkernels[plot]" in capsys.readouterr().err and not output.exists()
