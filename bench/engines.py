"""A data set by `vft encode --batch` and by `--engine ray`, each killed twice and resumed: `python bench/engines.py`.

Makes clips of 17 x 32 x 32, encodes them with the embedded model into a folder of files and into shards, kills each
run at two random points with SIGKILL and starts it again at once. Then counts clips lost, clips there twice, checksums
that are wrong, and ids that differ between the two. Throughput is that of all runs together, so what a kill costs
(starting again, and work done again) is in it; that of the last run from its first clip on stands beside it. Prints a
table and writes it as JSON; exit code 1 where a clip is wrong or Ray is slower than `--least` of `--batch`.

Needs ray (`pip install 'flexkernels[ray]'`).
"""

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vft.batch import read_manifest
from vft.data import TokenDataset
from vft.data.index import SUFFIX
from vft.tokens import VideoTokens
from vft.video import resize, write_video

FRAMES, SIZE = 17, 32
# seconds between looks at what is done, which are cheap
POLL = 0.2
# of the clips, between which a run is killed
KILLS = ((0.1, 0.4), (0.5, 0.8))


@dataclass
class Row:
    """One engine: seconds of its three runs; clips done when it was killed; clips a second of all runs, and of the last
    one once it was going; what was wrong in the end."""

    engine: str
    clips: int
    seconds: list[float]
    killed_at: list[int]
    clips_per_second: float
    going: float
    lost: int
    twice: int
    wrong_checksums: int
    left_behind: int

    @property
    def right(self) -> bool:
        return not (self.lost or self.twice or self.wrong_checksums or self.left_behind)


def make_clip(path: Path, number: int) -> None:
    """A moving blur of colours, another for each number."""
    draw = torch.Generator().manual_seed(number)
    colours = torch.randint(256, (FRAMES, 4, 4, 3), dtype=torch.uint8, generator=draw)
    write_video(path, resize(colours, SIZE, SIZE), 10)


def _make_part(folder: Path, numbers: range) -> None:
    torch.set_num_threads(1)
    for number in numbers:
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.mp4"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make_clip(path, number)


def make_clips(folder: Path, count: int) -> None:
    """``count`` files in folders of 1,000, by a process a core."""
    parts = [range(start, min(start + 250, count)) for start in range(0, count, 250)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_make_part, [folder] * len(parts), parts))


def run(command: list[str], done: Callable[[], int], kill_at: int | None, delay: float) -> tuple[float, int, float]:
    """Seconds of a run, clips done at its end, and clips a second from the first that it did.

    Killed ``delay`` seconds after ``kill_at`` clips are done, where that is given.
    """
    start, before, first = time.perf_counter(), done(), None
    process = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr)
    while process.poll() is None:
        now = done()
        if first is None and now > before:
            first = time.perf_counter(), now
        if kill_at is not None and now >= kill_at:
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(POLL)
    code, end = process.wait(), time.perf_counter()
    if code != (0 if kill_at is None else -signal.SIGKILL):
        raise RuntimeError(f"exit code {code} before the run was killed: {' '.join(command)}")
    going = 0.0 if first is None or end == first[0] else (done() - first[1]) / (end - first[0])
    return end - start, done(), going


def files_done(output: Path) -> int:
    return sum(part.read_bytes().count(b"\n") for part in output.glob("manifest.*.jsonl"))


def shards_done(output: Path) -> int:
    return sum(map(rows_of_index, output.glob(f"*{SUFFIX}")))


@functools.cache
def rows_of_index(index: Path) -> int:
    return len(json.loads(index.read_bytes())["key"])


def check_files(output: Path, names: list[str]) -> tuple[int, int, int]:
    """Lost, twice, wrong checksums."""
    lines = [json.loads(line) for part in output.glob("manifest.*.jsonl") for line in part.read_text().splitlines()]
    stated = Counter(line["file"] for line in lines if "checksum" in line)
    right = read_manifest(output, names)
    lost = [name for name in names if name not in stated]
    return len(lost), sum(n > 1 for n in stated.values()), len(stated.keys() - right.keys())


def check_shards(output: Path, names: list[str]) -> tuple[int, int, int]:
    rows = TokenDataset(output)
    stated = Counter(rows.keys())
    damaged = [key for key, why in rows.damaged().items() if "twice" not in why]
    return len(set(names) - stated.keys()), sum(n > 1 for n in stated.values()), len(damaged)


def equal_ids(files: Path, shards: Path) -> float:
    """The least share of equal ids in a clip: values on the edge between two levels may differ, whole clips may not."""
    rows = TokenDataset(shards)
    shares = []
    for row in (rows[i] for i in range(len(rows))):
        ids = VideoTokens.load(files / f"{row['key']}.vft").ids
        shares.append(float((ids == row["ids"]).float().mean()) if ids.shape == row["ids"].shape else 0.0)
    return min(shares)


def measure(engine: str, videos: Path, output: Path, options: list[str], rng: random.Random) -> Row:
    names = sorted(path.relative_to(videos).as_posix() for path in videos.rglob("*.mp4"))
    command = [sys.executable, "-m", "vft", "encode", str(videos), "-o", str(output), *options]
    count, check = (files_done, check_files) if engine == "batch" else (shards_done, check_shards)
    seconds, killed_at = [], []
    for low, high in KILLS:
        kill_at = round(rng.uniform(low, high) * len(names))
        took, done, _ = run(command, lambda: count(output), kill_at, rng.uniform(0, 2))
        seconds.append(took)
        killed_at.append(done)
    took, _, going = run(command, lambda: count(output), None, 0)
    seconds.append(took)
    lost, twice, wrong = check(output, names)
    left = sum(path.name.endswith(".tmp") for path in output.rglob("*"))
    seconds, rate = [round(s, 2) for s in seconds], round(len(names) / sum(seconds), 2)
    return Row(engine, len(names), seconds, killed_at, rate, round(going, 2), lost, twice, wrong, left)


def table(rows: list[Row]) -> str:
    head = "| engine | clips | seconds | killed at clip | clips/s | once going | lost | twice | wrong | left behind |"
    lines = [head, "|---|---:|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        seconds, killed = " + ".join(f"{s:.1f}" for s in row.seconds), ", ".join(f"{n:,}" for n in row.killed_at)
        wrong = f"{row.lost} | {row.twice} | {row.wrong_checksums} | {row.left_behind}"
        rates = f"{row.clips_per_second:.1f} | {row.going:.1f}"
        lines.append(f"| {row.engine} | {row.clips:,} | {seconds} | {killed} | {rates} | {wrong} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2, help="of Ray, on this machine (default: 2)")
    parser.add_argument("--shard-size", type=int, default=100, help="clips of a shard (default: 100)")
    parser.add_argument("--seed", type=int, help="of the points at which runs are killed (default: another each time)")
    parser.add_argument("--least", type=float, default=0.95, help="share of --batch's throughput (default: 0.95)")
    parser.add_argument("--json", type=Path, help="where the table goes")
    parser.add_argument("--folder", type=Path, help="where clips and tokens go (default: a temporary one)")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 31) if args.seed is None else args.seed
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        videos, files, shards = folder / "videos", folder / "batch", folder / "ray"
        make_clips(videos, args.clips)
        ray = ["--engine", "ray", "--workers", str(args.workers), "--shard-size", str(args.shard_size)]
        rows = [
            measure("batch", videos, files, ["--device", "cpu", "--batch"], rng),
            measure("ray", videos, shards, ["--device", "cpu", *ray], rng),
        ]
        equal = equal_ids(files, shards)
    ratio = rows[1].clips_per_second / rows[0].clips_per_second
    print(table(rows))
    going = rows[1].going / rows[0].going
    print(f"Ray has {ratio:.2f} of --batch's throughput, {going:.2f} once both are going; seed {seed}")
    print(f"{equal:.1%} or more of a clip's ids are equal")
    if args.json:
        result = {"seed": seed, "cores": os.cpu_count(), "workers": args.workers, "shard_size": args.shard_size}
        result |= {
            "ratio": round(ratio, 3),
            "going": round(going, 3),
            "equal_ids": round(equal, 4),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row.right for row in rows) and equal > 0.9 and ratio >= args.least else 1


if __name__ == "__main__":
    sys.exit(main())
