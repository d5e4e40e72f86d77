"""A folder to shards: no video lost, none twice, wherever a run is stopped and whichever engine runs it."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from vft import Tokenizer, cli, video
from vft.config import make_config, parse_config
from vft.data import Encoder, TokenDataset, encode, engines
from vft.data.index import SUFFIX

COUNT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    config = make_config(codec="linear", encoder_width=32, decoder_width=32, head_dim=32, registers=4, size=16)
    torch.manual_seed(0)
    Tokenizer(parse_config(config), "small").save(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    (root / "cat").mkdir()
    for i in range(COUNT):
        pixels = torch.full((1 + i % 6, 16, 16, 3), 10 * i, dtype=torch.uint8)
        video.write_video(root / ("cat" if i % 2 else "") / f"{i:02d}.mp4", pixels, 10)
    return root


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def command(folder, output, model, *options):
    common = ["--model", model, "--device", "cpu", "--shard-size", "4"]
    return ["encode", str(folder), "-o", str(output), *common, *options]


def check_complete(folder, output, model):
    rows = TokenDataset(output)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.mp4"))
    assert sorted(rows.keys()) == names and rows.damaged() == {}
    assert not [p for p in output.iterdir() if p.name.endswith(".tmp")]
    tokenizer = Tokenizer.from_pretrained(model)
    for i in range(0, len(rows), 7):
        want = tokenizer.encode(folder / rows[i]["key"])
        assert rows[i]["frames"] == want.frames and (rows[i]["ids"] == want.ids).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_folder(tmp_path, folder, model, kind, capsys):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    assert cli.main(command(folder, tmp_path, model, "--shards", kind)) == 0
    assert f"{COUNT} encoded, 0 there already, 0 failed" in capsys.readouterr().out
    assert len(list(tmp_path.glob(f"shard-*.{kind}"))) == COUNT // 4
    check_complete(folder, tmp_path, model)
    # a shard that is cut off, one without an index: both are made again, the others are not
    shards = sorted(tmp_path.glob(f"shard-*.{kind}"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].with_name(shards[1].name + SUFFIX).unlink()
    before = [path.stat().st_mtime_ns for path in shards]
    assert cli.main(command(folder, tmp_path, model, "--shards", kind)) == 0
    assert f"8 encoded, {COUNT - 8} there already" in capsys.readouterr().out
    changed = [path.stat().st_mtime_ns != stamp for path, stamp in zip(shards, before, strict=True)]
    assert changed == [True, True] + [False] * (COUNT // 4 - 2)
    check_complete(folder, tmp_path, model)


def test_new_videos_and_bad_ones(tmp_path, folder, model, capsys):
    source = tmp_path / "videos"
    source.mkdir()
    for i in range(5):
        os.link(folder / f"{2 * i:02d}.mp4", source / f"{i}.mp4")
    (source / "3.mp4").unlink()
    (source / "3.mp4").write_bytes(b"no video")
    assert cli.main(command(source, tmp_path / "out", model, "--shards", "tar")) == 1
    captured = capsys.readouterr()
    assert "4 encoded, 0 there already, 1 failed" in captured.out and "3.mp4: not a video" in captured.err
    os.link(folder / "10.mp4", source / "0a.mp4")
    assert cli.main(command(source, tmp_path / "out", model, "--shards", "tar")) == 1
    assert "1 encoded, 4 there already, 1 failed" in capsys.readouterr().out
    (source / "3.mp4").unlink()
    check_complete(source, tmp_path / "out", model)


def test_ranks_take_parts_of_their_own(tmp_path, folder, model):
    for rank in range(2):
        summary = encode.encode_shards(folder, tmp_path, Encoder(model), shard_size=4, rank=rank, world_size=2)
        assert summary.encoded == COUNT // 2 and summary.skipped == 0
    check_complete(folder, tmp_path, model)


def test_other_settings_are_refused(tmp_path, folder, model, capsys):
    assert cli.main(command(folder, tmp_path, model, "--shards", "tar")) == 0
    assert cli.main(command(folder, tmp_path, model, "--shards", "tar", "-k", "2")) == 2
    assert "registers must be 2 as asked for, got 4" in capsys.readouterr().err
    for options in (["--batch"], ["--audio", "copy"], ["--checksum"]):
        assert cli.main(command(folder, tmp_path, model, "--shards", "tar", *options)) == 2
        assert "--shards and --engine take folders" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, folder, model, monkeypatch, capsys):
    write, calls = encode.write_shard, []

    def full(path, rows):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, rows)

    monkeypatch.setattr(encode, "write_shard", full)
    assert cli.main(command(folder, tmp_path, model, "--shards", "tar")) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert cli.main(command(folder, tmp_path, model, "--shards", "tar")) == 0
    check_complete(folder, tmp_path, model)


def killed(argv, output, shards):
    """A run that is killed, with all its processes, once it has written `shards` shards."""
    run = subprocess.Popen([sys.executable, "-m", "vft", *argv], start_new_session=True)
    deadline = time.time() + 200
    while len(list(output.glob(f"*{SUFFIX}"))) < shards and time.time() < deadline and run.poll() is None:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    return run.wait()


def test_killed_and_resumed(tmp_path, folder, model):
    assert killed(command(folder, tmp_path, model, "--shards", "tar", "--packed", "1"), tmp_path, 2) == -signal.SIGKILL
    done = len(list(tmp_path.glob(f"*{SUFFIX}")))
    assert cli.main(command(folder, tmp_path, model, "--shards", "tar")) == 0
    assert done >= 2
    check_complete(folder, tmp_path, model)


class Dying(encode.ShardWriter):
    """Its process dies at the first shard."""

    def write(self, shard, keys):
        mark = self.output / "died"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(shard, keys)


class Deadly(encode.ShardWriter):
    """Whoever reads 07.mp4 dies."""

    def write(self, shard, keys):
        if "cat/07.mp4" in keys:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(shard, keys)


class Wrong(encode.ShardWriter):
    """Fails in a way that nothing expects."""

    def write(self, shard, keys):
        raise KeyError("what nobody has thought of")


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    pytest.importorskip("pandas")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    yield
    ray.shutdown()


def encode_by_ray(folder, output, model):
    engine = engines.make("ray", 2, 0)
    return encode.encode_shards(folder, output, Encoder(model, device="cpu"), shard_size=4, engine=engine)


@pytest.mark.slow
def test_ray_where_a_worker_dies(tmp_path, folder, model, monkeypatch, cluster):
    monkeypatch.setattr(encode, "ShardWriter", Dying)
    summary = encode_by_ray(folder, tmp_path, model)
    assert (tmp_path / "died").exists() and summary.encoded == COUNT
    check_complete(folder, tmp_path, model)


@pytest.mark.slow
def test_ray_where_a_worker_dies_whenever_it_is_at_a_shard(tmp_path, folder, model, monkeypatch, cluster):
    with monkeypatch.context() as patch:
        patch.setattr(encode, "ShardWriter", Deadly)
        with pytest.raises(OSError, match=r"shard-\w+\.tar: .*its worker died 4 times"):
            encode_by_ray(folder, tmp_path, model)
    encode_by_ray(folder, tmp_path, model)
    check_complete(folder, tmp_path, model)


class Death(BaseException):
    """Of a process, in one that goes on."""


def test_a_shard_that_ends_its_workers_is_given_up(tmp_path, folder, model):
    class Fatal(encode.ShardWriter):
        def write(self, shard, keys):
            raise Death

    batch = {"shard": np.array(["shard-0.tar"]), "keys": np.array([["00.mp4"]])}
    for _ in range(engines.TRIES):
        with pytest.raises(Death):
            engines._Actor(Fatal(Encoder(model), folder, tmp_path))(batch)
    given = engines._Actor(Fatal(Encoder(model), folder, tmp_path))(batch)
    assert list(given["failure"]) == ["RuntimeError: its worker died 4 times, of memory or of one of its videos"]
    assert not list(tmp_path.iterdir())
    (tmp_path / ".shard-0.tar.tries").write_text("..")
    given = engines._Actor(encode.ShardWriter(Encoder(model), folder, tmp_path))(batch)
    assert list(given["rows"]) == [1] and not list(tmp_path.glob(".*.tries"))
    given = engines._Actor(Wrong(Encoder(model), folder, tmp_path))(batch)
    assert list(given["failure"]) == ["KeyError: 'what nobody has thought of'"] and not list(tmp_path.glob(".*.tries"))


def test_what_ray_itself_raises_is_one_line(tmp_path, folder, model, monkeypatch):
    class Failing:
        """As much of ray and ray.data as is called."""

        class RayError(Exception):
            pass

        DataContext = exceptions = property(lambda self: self)
        is_initialized = from_items = map_batches = ActorPoolStrategy = get_current = lambda self, *a, **b: self

        def iter_rows(self):
            yield {"shard": "a.tar", "rows": 1, "errors": "[]", "failure": ""}
            raise self.RayError("the cluster is gone\n  pages of it")

    (tmp_path / ".shard-9.tar.tries").write_text("....")
    monkeypatch.setattr(engines, "ray", Failing())
    monkeypatch.setattr(engines, "ray_data", Failing())
    with pytest.raises(RuntimeError) as raised:
        list(engines.make("ray", 2, 0)([{}], encode.ShardWriter(Encoder(model), folder, tmp_path)))
    assert str(raised.value) == "the engine ray failed: the cluster is gone" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ray_killed_twice_and_resumed(tmp_path, folder, model):
    pytest.importorskip("ray")
    pytest.importorskip("pandas")
    argv = command(folder, tmp_path, model, "--engine", "ray", "--workers", "2")
    assert killed(argv, tmp_path, 1) == killed(argv, tmp_path, 3) == -signal.SIGKILL
    subprocess.run([sys.executable, "-m", "vft", *argv], check=True)
    check_complete(folder, tmp_path, model)


def test_daft(tmp_path, folder, model):
    pytest.importorskip("daft")
    assert cli.main(command(folder, tmp_path, model, "--engine", "daft", "--workers", "2")) == 0
    check_complete(folder, tmp_path, model)


def test_an_engine_that_is_not_there_says_what_to_install(tmp_path, folder, model, monkeypatch, capsys):
    for engine in ("ray", "daft"):
        monkeypatch.setitem(sys.modules, engine, None)
        assert cli.main(command(folder, tmp_path, model, "--engine", engine)) == 2
        assert f"the engine {engine} needs {engine}: pip install" in capsys.readouterr().err
