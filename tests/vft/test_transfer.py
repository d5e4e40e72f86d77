"""Batches of chunks on two streams: what is copied, computed and waited for, in which order. Recorders stand in for
CUDA."""

import copy
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_copies import forbidden

from flexkernels import upload as upload_module
from flexkernels.upload import upload
from vft import batch, tokenizer, transfer
from vft.config import make_config, parse_config
from vft.tokenizer import Tokenizer

CUDA, META = torch.device("cuda", 0), torch.device("meta")
SMALL = make_config(
    codec="linear", encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=4, size=16
)


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(f"{self.name} records")
        return SimpleNamespace(synchronize=lambda: self.log.append(f"host waits for {self.name}"))

    def wait_event(self, event):
        self.log.append(f"{self.name} waits")

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


class Tensor:
    """A host's tensor, pinned or not."""

    device = torch.device("cpu")

    def __init__(self, log, stream, pinned):
        self.log, self.stream, self.pinned = log, stream, pinned

    def is_pinned(self):
        return self.pinned

    def pin_memory(self):
        self.log.append("pinned")
        return Tensor(self.log, self.stream, True)

    def to(self, device, non_blocking):
        assert self.pinned and non_blocking and device == CUDA
        self.log.append(f"copied on {self.stream[-1].name}")
        return SimpleNamespace(record_stream=lambda stream: self.log.append(f"kept for {stream.name}"))


@pytest.fixture
def cuda(monkeypatch):
    """The log of a GPU, and its streams, the current one last."""
    log = []
    streams = [Stream("compute", log)]

    @contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return SimpleNamespace(log=log, streams=streams)


def test_copies_have_a_stream_of_their_own_which_computing_waits_for(cuda):
    uploads = transfer.Uploads(CUDA)
    assert len(uploads([Tensor(cuda.log, cuda.streams, pinned) for pinned in (True, False)])) == 2
    assert cuda.log == [
        "copied on copies", "pinned", "copied on copies", "copies records", "compute waits", "kept for compute",
        "kept for compute",
    ]  # fmt: skip


def test_what_lies_on_a_gpu_is_not_pinned(cuda):
    """Frames that a decoder of video left there, for one."""
    there = SimpleNamespace(device=CUDA, to=lambda device: there)
    assert transfer.Uploads(CUDA)([there]) == [there] and cuda.log == []


def test_a_capture_takes_no_data_of_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="layouts must be made before the capture of a CUDA graph"):
        upload([torch.arange(3)], CUDA)
    assert len(upload([torch.arange(3)], torch.device("cpu"))) == 1


def test_what_is_kept_is_there_when_upload_returns(cuda, monkeypatch):
    """Other streams may read it, and have nothing to wait for."""
    flat = Tensor(cuda.log, cuda.streams, True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: flat)
    monkeypatch.setattr(upload_module, "_views", lambda *args: [])
    upload_module._copies.cache_clear()
    upload([], CUDA)
    assert cuda.log == ["copied on compute"]
    cuda.log.clear()
    upload([], CUDA, kept=True)
    assert cuda.log == ["copied on copies", "host waits for copies", "kept for compute"]


def test_a_copy_has_its_own_stream(cuda):
    uploads = transfer.Uploads(CUDA)
    again = copy.deepcopy(uploads)
    assert again.device == CUDA and again.stream is not uploads.stream


def test_on_the_cpu_nothing_is_copied():
    x = torch.arange(3)
    assert transfer.Uploads(torch.device("cpu"))([x])[0] is x and transfer.Download(x).wait() is x


def test_a_download_is_waited_for_once_and_late(cuda, monkeypatch):
    made = []

    class Host:
        def copy_(self, x, non_blocking):
            assert non_blocking
            cuda.log.append("copied back")

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: made.append(pin_memory) or Host())
    coming = transfer.Download(SimpleNamespace(is_cuda=True, shape=(2,), dtype=torch.int64, device=CUDA))
    assert cuda.log == ["copied back", "compute records"] and made == [True]
    assert isinstance(coming.wait(), Host) and cuda.log[2:] == ["host waits for compute"]


def test_launching_waits_for_nothing(monkeypatch):
    """Tensors of "meta", which have no values to read, in the GPU's place."""

    class Uploads:
        device = META

        def __call__(self, tensors):
            return [torch.empty(x.shape, dtype=x.dtype, device=META) for x in tensors]

    torch.manual_seed(0)
    model = Tokenizer(parse_config(SMALL), "small").eval().requires_grad_(False)
    assert model.codec.name == "linear"
    model.to(META)
    monkeypatch.setattr(tokenizer, "Uploads", lambda device: Uploads())
    chunks = [torch.zeros(t, 16, 16, 3, dtype=torch.uint8) for t in (17, 5, 17)]
    # layouts go to the device at a first call
    model.launch_chunks(chunks)
    assert callable(forbidden(lambda: model.launch_chunks(chunks)))


def test_launched_chunks_have_their_ids_and_refuse_what_is_not_finite():
    torch.manual_seed(0)
    model = Tokenizer(parse_config(SMALL), "small").eval().requires_grad_(False)
    chunks = [torch.randint(256, (t, 16, 16, 3), dtype=torch.uint8) for t in (17, 5, 17)]
    chunks.append(2 * torch.rand(5, 3, 16, 16) - 1)
    ids = model.launch_chunks(chunks)()
    clips = [x.transpose(0, 1) if x.is_floating_point() else x.permute(3, 0, 1, 2).float() / 127.5 - 1 for x in chunks]
    wanted = model.encode_latents([model.codec.encode(clip[None])[0] for clip in clips])
    assert [i.shape for i in ids] == [(5, 4), (2, 4), (5, 4), (2, 4)]
    # a value between two levels may round otherwise
    assert torch.cat(ids).eq(torch.cat(wanted)).float().mean() > 0.95
    model.codec.scale[:] = torch.inf
    launched = model.launch_chunks(chunks[:1])
    with pytest.raises(ValueError, match="latents must be finite"):
        launched()


class Model:
    """Logs what is launched and waited for; chunks are numbers, those below 0 are refused."""

    def __init__(self, kind, log):
        self.device, self.log = SimpleNamespace(type=kind), log

    def launch_chunks(self, chunks):
        self.log.append(f"launch {chunks}")

        def wait():
            self.log.append(f"wait {chunks}")
            if min(chunks) < 0:
                raise ValueError("refused")
            return chunks

        return wait


def run(kind, videos, monkeypatch):
    """The log, and (name, ids or error) of each job, of videos {name: chunks} that one reader reads."""
    log = []
    monkeypatch.setattr(batch, "_chunks", lambda tokenizer, job, strict: iter(videos[job.file]))
    jobs = [batch.Job(name, Path(name)) for name in videos]
    found = []
    for job in batch.encode_jobs(Model(kind, log), jobs, 2, 1, False):
        log.append(f"done {job.file}")
        found.append((job.file, job.error or list(job.ids)))
    return log, found


VIDEOS = {"a": [1, 2, 3], "b": [4], "c": [5, 6], "d": [7]}


def test_a_gpu_has_the_next_batch_before_the_host_waits_for_one(monkeypatch):
    log, found = run("cuda", VIDEOS, monkeypatch)
    assert log == [
        "launch [1, 2]", "launch [3, 4]", "wait [1, 2]", "launch [5, 6]", "wait [3, 4]", "done a", "done b",
        "launch [7]", "wait [5, 6]", "done c", "wait [7]", "done d",
    ]  # fmt: skip
    assert dict(found) == VIDEOS


def test_a_cpu_computes_batch_after_batch(monkeypatch):
    log, found = run("cpu", VIDEOS, monkeypatch)
    assert [line for line in log if "done" not in line] == [
        f"{what} {part}" for part in ([1, 2], [3, 4], [5, 6], [7]) for what in ("launch", "wait")
    ]
    assert dict(found) == VIDEOS and log.index("done b") < log.index("launch [5, 6]")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_one_video_that_is_refused_stops_no_other(kind, monkeypatch):
    videos = {"a": [1, 2, 3], "b": [-4, 5], "c": [6, 7]}
    _, found = run(kind, videos, monkeypatch)
    assert dict(found) == {"a": [1, 2, 3], "b": "refused", "c": [6, 7]}
