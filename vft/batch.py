"""``vft encode --batch``: a folder of videos to a folder of ``.vft`` files, in bounded memory, resumable, sharded.

Threads read videos and cut them into chunks; the chunks of several videos are encoded in one packed call. A video
``a/b.mp4`` becomes ``a/b.mp4.vft``. Beside the token files lies one manifest a process, ``manifest.<rank>.jsonl``, each
line a JSON object about one video:

    {"file": "a/b.mp4", "model": "tiny", "registers": 32, "frames": 81, "tokens": 672,
     "checksum": SHA-256 of the token file, "source": {"bytes": 52011, "modified": nanoseconds},
     "asked": options other than the default ones, "warnings": what was lost of the video}
    {"file": "a/bad.mp4", "error": why it could not be encoded}

A line is written after its token file is complete. Lines count only while their checksum is that of the file, their
video has the size and the time of modification that they state, and they were asked for the same, so the parts need no
order among them and the number of processes may change from run to run; videos without such a line, bad ones too, are
encoded in the next run.
"""

import hashlib
import json
import os
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vft.files import check_output, only_writer, replacing
from vft.scan import scan
from vft.stills import still_groups
from vft.video import cut_chunks, open_video
from vft.video.audio import save_audio


@dataclass(frozen=True)
class Summary:
    """Numbers of videos: encoded now, already there, and failed; files left out and why; videos with unused audio."""

    encoded: int
    skipped: int
    failed: int
    left_out: dict[str, str] = field(default_factory=dict)
    silent: int = 0


def shard(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, number of processes) as ``torchrun`` states them in RANK and WORLD_SIZE; (0, 1) without.

    Raises:
        ValueError: only one of the two is there, or they are not 0 <= RANK < WORLD_SIZE.
    """
    texts = environment.get("RANK"), environment.get("WORLD_SIZE")
    if texts == (None, None):
        return 0, 1
    if None in texts:
        raise ValueError(f"RANK and WORLD_SIZE must be set together, got {texts[0]!r} and {texts[1]!r}")
    if not all(text.isascii() and text.isdigit() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise ValueError(f"RANK and WORLD_SIZE must be 0 <= RANK < WORLD_SIZE, got {texts[0]!r} and {texts[1]!r}")
    return int(texts[0]), int(texts[1])


def encode_folder(
    tokenizer,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    keep: int | None = None,
    packed: int = 8,
    readers: int = 2,
    rank: int = 0,
    world_size: int = 1,
    fps: float | None = None,
    strict: bool = False,
    audio: bool = False,
    checksum: bool = False,
    progress: Callable[[int, int, dict | None], None] = lambda done, total, line: None,
) -> Summary:
    """Encodes every ``world_size``-th video below ``source``, from the ``rank``-th of the sorted list on.

    Args:
        output: folder for token files and manifests, made if missing.
        keep: registers of each latent frame that are written (default: all).
        packed: chunks encoded in one call. At most twice as many are in memory, three times as many where a GPU encodes
            while the next ones are read, and one more for each reader.
        readers: threads that read videos.
        fps, strict: see :func:`vft.video.open_video`.
        audio: copy audio tracks beside the token files, see :func:`vft.video.audio.save_audio`.
        checksum: tell by the SHA-256 of a video whether it has changed, not by its time of modification.
        progress: called with videos done, videos in all, and None at the start, then the manifest line of each video.

    The chunks of several videos share a call, so a value on the edge between two levels may round otherwise than in
    ``tokenizer.encode``. A bad video is written to the manifest and counted; the others go on.

    Raises:
        ValueError, OSError: ``source`` has no videos, a number is out of range, ``output`` cannot be written, or
            another run writes there.
    """
    for name, value in (("packed", packed), ("readers", readers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and {world_size - 1}, got {rank}")
    keep = tokenizer.registers if keep is None else keep
    if not 1 <= keep <= tokenizer.registers:
        raise ValueError(f"keep must be between 1 and {tokenizer.registers}, got {keep}")
    found = scan(source)
    videos = found.videos[rank::world_size]
    output = _folder(output)
    with only_writer(output, rank, world_size):
        asked = ({} if fps is None else {"fps": fps}) | ({"audio": True} if audio else {})
        finished = read_manifest(output, videos)
        jobs = []
        for file in videos:
            job = Job(file, Path(source, file), _facts(Path(source, file), checksum), asked)
            entry = finished.get(file)
            # lines of earlier versions do not state the fingerprint
            made_by = entry and (entry["model"], entry.get("fingerprint", tokenizer.fingerprint), entry["registers"])
            wanted = made_by == (tokenizer.name, tokenizer.fingerprint, keep)
            if not wanted or not _current(entry, job) or (strict and entry.get("warnings")):
                jobs.append(job)
        skipped, failed, silent = len(videos) - len(jobs), 0, 0
        with (
            _manifest(output, rank, {job.file for job in jobs}) as write,
            closing(encode_jobs(tokenizer, jobs, packed, readers, strict)) as encoded,
        ):
            progress(skipped, len(videos), None)
            for count, job in enumerate(encoded, skipped + 1):
                line = _save(job, output, keep, tokenizer)
                job.ids.clear()
                failed += "error" in line
                silent += job.audio and not audio
                write(line)
                progress(count, len(videos), line)
        return Summary(len(jobs) - failed, skipped, failed, found.left_out, silent)


def _facts(path: Path, checksum: bool) -> dict:
    """What tells whether a video has changed; a file that is gone has none."""
    try:
        stat = path.stat()
        facts = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
        if checksum:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            facts["checksum"] = digest.hexdigest()
        return facts
    except OSError:
        return {}


def _current(entry: dict, job: "Job") -> bool:
    """Whether a finished line was asked for the same, of a video that has not changed."""
    if entry.get("asked", {}) != job.asked:
        return False
    # lines of earlier versions do not state their source
    stated = entry.get("source", job.facts)
    key = "checksum" if "checksum" in job.facts else "modified"
    return (stated.get("bytes"), stated.get(key)) == (job.facts.get("bytes"), job.facts.get(key))


def read_manifest(output: str | os.PathLike, files: list[str] | None = None) -> dict[str, dict]:
    """The finished videos (among ``files``, where given): their manifest lines that agree with the token files."""
    wanted = None if files is None else set(files)
    entries = {}
    for part in sorted(Path(output).glob("manifest.*.jsonl")):
        for entry in _lines(part):
            file = entry["file"]
            if (wanted is None or file in wanted) and file not in entries and _holds(Path(output), entry):
                entries[file] = entry
    return entries


def _lines(part: Path) -> Iterator[dict]:
    for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
        # a process that was killed may leave half a line
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("file"), str):
                yield entry


def _holds(output: Path, entry: dict) -> bool:
    if not {"model", "registers", "checksum"} <= entry.keys():
        return False
    try:
        data = _target(output, entry["file"]).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == entry["checksum"]


def _folder(output: str | os.PathLike) -> Path:
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise OSError(f"output {str(output)!r} must be a folder, got a file")
    output.mkdir(parents=True, exist_ok=True)
    return output


@contextmanager
def _manifest(output: Path, rank: int, todo: set[str]) -> Iterator[Callable[[dict], None]]:
    """A function that appends a line to this process's part, from which the lines of ``todo`` have been dropped."""
    part = check_output(output / f"manifest.{rank}.jsonl")
    old = [entry for entry in _lines(part) if entry["file"] not in todo] if part.exists() else []
    with replacing(part) as temporary:
        temporary.write_text("".join(map(_line, old)), encoding="utf-8")
    descriptor = os.open(part, os.O_WRONLY | os.O_APPEND)
    try:
        # one write a line: an interrupt comes before or after it
        yield lambda entry: os.write(descriptor, _line(entry).encode()) and None
    finally:
        os.close(descriptor)


def _line(entry: dict) -> str:
    return json.dumps(entry) + "\n"


def _target(output: Path, file: str) -> Path:
    # the whole name stays: a.mp4 and a.mov may lie side by side
    return output / f"{file}.vft"


@dataclass(eq=False)
class Job:
    """One video on its way: a reader counts its frames, the encoder adds ids; ``error`` where it failed.

    A video that is no file is given as ``data``, its bytes; ``path`` is then a file of them for as long as it is read.
    """

    file: str
    path: Path
    facts: dict = field(default_factory=dict)
    asked: dict = field(default_factory=dict)
    audio: bool = False
    warnings: list[str] = field(default_factory=list)
    source: tuple[float, int, int] = (0.0, 0, 0)
    frames: int = 0
    ids: list[torch.Tensor] = field(default_factory=list)
    still: list[list[bool]] = field(default_factory=list)
    error: str | None = None
    data: bytes | None = None

    def fail(self, error: Exception) -> None:
        text = " ".join(str(error).split()).removeprefix(f"{self.path}: ")
        self.error = self.error or text or type(error).__name__


def _save(job: Job, output: Path, keep: int, tokenizer) -> dict:
    """Writes the token file; returns the manifest line."""
    if job.error is None:
        path = _target(output, job.file)
        try:
            fps, height, width = job.source
            tokens = tokenizer.join_chunks(job.ids, job.still, fps, job.frames, height, width).truncate(keep)
            data = tokens.to_bytes()
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            if job.asked.get("audio"):
                save_audio(job.path, path)
        except (ValueError, OSError) as error:
            job.fail(error)
    if job.error is not None:
        return {"file": job.file, "error": job.error}
    return {
        "file": job.file, "model": tokens.model, "fingerprint": tokens.fingerprint,
        "registers": tokens.registers, "frames": tokens.frames,
        "tokens": tokens.ids.numel(), "checksum": hashlib.sha256(data).hexdigest(), "source": job.facts,
        **({"asked": job.asked} if job.asked else {}), **({"warnings": job.warnings} if job.warnings else {}),
    }  # fmt: skip


def encode_jobs(tokenizer, jobs: list[Job], packed: int, readers: int, strict: bool) -> Iterator[Job]:
    """Reads and encodes videos; yields each job once, in the order in which they end.

    A video that cannot be read or does not fit the model has ``error`` set; the others go on.
    """
    # while a GPU computes a batch, the host reads, copies and starts the next one
    running: deque[_Batch] = deque()
    behind = 1 if tokenizer.device.type == "cuda" else 0
    group: list[tuple[Job, torch.Tensor]] = []
    ended: list[Job] = []
    with closing(_read_ahead(tokenizer, jobs, packed, readers, strict)) as items:
        for job, chunk in items:
            if chunk is None:
                ended.append(job)
            elif job.error is None:
                group.append((job, chunk))
            if len(group) == packed:
                running.append(_Batch(tokenizer, group))
                group = []
            if not group:
                # its chunks are in the latest batch at most
                if running:
                    running[-1].ended += ended
                else:
                    yield from ended
                ended = []
            while len(running) > behind:
                yield from running.popleft().finish()
    if group:
        running.append(_Batch(tokenizer, group))
    for batch in running:
        yield from batch.finish()
    yield from ended


class _Batch:
    """Chunks of jobs that the device encodes; ``ended``: the jobs that end with it."""

    def __init__(self, tokenizer, group: list[tuple[Job, torch.Tensor]]) -> None:
        self.tokenizer, self.group, self.ended = tokenizer, group, []
        self.wait, self.error = None, None
        try:
            self.wait = tokenizer.launch_chunks([chunk for _, chunk in group])
        except ValueError as error:
            self.error = error

    def finish(self) -> list[Job]:
        """Waits for the ids; the jobs that end."""
        if self.error is None:
            try:
                encoded = self.wait()
            except ValueError as error:
                self.error = error
        if self.error is None:
            for (job, _), ids in zip(self.group, encoded, strict=True):
                job.ids.append(ids)
            return self.ended
        jobs = dict.fromkeys(job for job, _ in self.group)
        if len(jobs) == 1:
            self.group[0][0].fail(self.error)
            return self.ended
        # one of the videos does not fit the model: find it
        for job in jobs:
            _Batch(self.tokenizer, [item for item in self.group if item[0] is job]).finish()
        return self.ended


def _read_ahead(
    tokenizer, jobs: list[Job], bound: int, readers: int, strict: bool
) -> Iterator[tuple[Job, torch.Tensor | None]]:
    """(job, chunk) of all videos, those of one video in order, then (job, None); threads read ``bound`` items ahead.

    Closing the generator ends the threads.
    """
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    items: queue.Queue[tuple[Job, torch.Tensor | None]] = queue.Queue(bound)
    stop = threading.Event()
    for job in jobs:
        todo.put(job)

    def read() -> None:
        while not stop.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                for chunk in _chunks(tokenizer, job, strict):
                    items.put((job, chunk))
                    if stop.is_set():
                        return
            # whatever is wrong with a video must not end the run
            except Exception as error:
                job.fail(error)
            items.put((job, None))

    threads = [threading.Thread(target=read, daemon=True) for _ in range(min(readers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        left = len(jobs)
        while left:
            job, chunk = items.get()
            left -= chunk is None
            yield job, chunk
    finally:
        stop.set()
        while any(thread.is_alive() for thread in threads):
            # a thread may wait for room
            with suppress(queue.Empty):
                items.get(timeout=0.05)


def _chunks(tokenizer, job: Job, strict: bool) -> Iterator[torch.Tensor]:
    config, stride = tokenizer.config, tokenizer.codec.temporal_stride
    fps = job.asked.get("fps")
    with _file(job) as path, open_video(path, tokenizer.size, fps=fps, strict=strict, warn=False) as video:
        job.source, job.audio = (video.fps, video.height, video.width), video.audio
        for chunk, new in cut_chunks(video.frames, config.chunk_size, config.overlap, stride):
            job.frames += new
            job.still.append(still_groups(chunk, stride))
            # in memory that a GPU reads while the encoder is busy
            yield chunk.pin_memory() if tokenizer.device.type == "cuda" else chunk
    job.warnings += video.warnings


@contextmanager
def _file(job: Job) -> Iterator[Path]:
    if job.data is None:
        yield job.path
        return
    # FFmpeg opens names
    with tempfile.NamedTemporaryFile() as file:
        file.write(job.data)
        file.flush()
        job.path = Path(file.name)
        yield job.path
