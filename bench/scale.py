"""What a data set of many clips costs on many GPUs, with slow and preempted workers: `python bench/scale.py --help`.

Workers take shards from a queue. A worker that is preempted loses the shard it is at, which goes back into the queue;
it comes back after a while and loads the model again. Slow workers do everything `--slow-factor` times slower. The
simulation is compared with the estimate: clips x seconds / workers, plus what slowness and preemptions cost on average.
"""

import argparse
import heapq
import json
import random
from dataclasses import asdict, dataclass

DAY = 86400.0


@dataclass(frozen=True)
class Fleet:
    """seconds a clip and GPU; shard: clips; preemptions a worker and day, after which it is away and then starts, in
    seconds; a share of workers is slow by a factor; bytes of tokens a clip and of input a clip."""

    clips: int = 1_000_000_000
    workers: int = 1000
    seconds: float = 0.0284
    shard: int = 10_000
    preemptions: float = 1.0
    away: float = 600.0
    start: float = 60.0
    slow: float = 0.01
    slow_factor: float = 3.0
    token_bytes: int = 320
    input_bytes: int = 60_000

    @property
    def shards(self) -> int:
        return -(-self.clips // self.shard)


def estimate(fleet: Fleet) -> dict[str, float]:
    """Seconds of the whole, and clips lost to preemptions, on average, without the tail at the end."""
    rate = fleet.preemptions / DAY
    speed = fleet.workers * (1 - fleet.slow + fleet.slow / fleet.slow_factor)
    task = fleet.shard * fleet.seconds
    # of each preemption: half a shard, the time away and the start
    useful = 1 - rate * (task / 2 + fleet.away + fleet.start)
    seconds = fleet.start + fleet.clips * fleet.seconds / (speed * useful)
    return {"seconds": seconds, "lost_clips": fleet.workers * seconds * rate * fleet.shard / 2}


def simulate(fleet: Fleet, seed: int = 0) -> dict[str, float]:
    """One run of the queue, event by event. Every shard is counted once, when it is done."""
    rng = random.Random(seed)
    rate = fleet.preemptions / DAY
    left, done, lost, preempted, busy = fleet.shards, 0, 0.0, 0, 0.0
    slow = set(rng.sample(range(fleet.workers), round(fleet.slow * fleet.workers)))
    until = [rng.expovariate(rate) if rate else float("inf") for _ in range(fleet.workers)]
    # (time at which a worker is free, worker, whether it has a shard that is then done)
    events = [(fleet.start, worker, False) for worker in range(fleet.workers)]
    heapq.heapify(events)
    idle: list[int] = []
    end = 0.0
    while events:
        now, worker, finished = heapq.heappop(events)
        if finished:
            done += 1
            end = now
        if not left:
            idle.append(worker)
            continue
        left -= 1
        task = fleet.shard * fleet.seconds * (fleet.slow_factor if worker in slow else 1.0)
        if until[worker] < now:
            # preempted while it was idle or starting
            until[worker] = now + rng.expovariate(rate)
        if now + task <= until[worker]:
            busy += task
            heapq.heappush(events, (now + task, worker, True))
            continue
        # the shard goes back when the worker dies, and the worker comes back later
        died = until[worker]
        preempted += 1
        lost += (died - now) / task * fleet.shard
        left += 1
        back = died + fleet.away + fleet.start
        until[worker] = back + rng.expovariate(rate)
        heapq.heappush(events, (back, worker, False))
        if idle:
            heapq.heappush(events, (died, idle.pop(), False))
    assert done == fleet.shards
    return {
        "seconds": end, "lost_clips": lost, "preemptions": preempted, "shards": done,
        "busy": busy / (fleet.workers * end),
    }  # fmt: skip


def sizes(fleet: Fleet) -> dict[str, float]:
    """Files and bytes: a shard and its index for each part, and the input that has to be read a second."""
    return {
        "files": 2 * fleet.shards, "token_terabytes": fleet.clips * fleet.token_bytes / 1e12,
        "input_terabytes": fleet.clips * fleet.input_bytes / 1e12,
        "input_gigabytes_per_second": fleet.workers / fleet.seconds * fleet.input_bytes / 1e9,
    }  # fmt: skip


def row(fleet: Fleet) -> str:
    """A row of the table in docs/scale.md."""
    guess, run = estimate(fleet), simulate(fleet)
    cells = [
        f"{fleet.shard:,}", f"{fleet.preemptions:g}", f"{guess['seconds'] / 3600:.2f}", f"{run['seconds'] / 3600:.2f}",
        f"{run['preemptions']:,}", f"{run['lost_clips'] / fleet.clips:.2%}", f"{run['busy']:.1%}",
        f"{sizes(fleet)['files']:,}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Fleet()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    seed = args.pop("seed")
    fleet = Fleet(**args)
    print(json.dumps({"estimate": estimate(fleet), "simulated": simulate(fleet, seed), **sizes(fleet)}, indent=1))


if __name__ == "__main__":
    main()
