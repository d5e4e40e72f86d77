"""Time: which rate a file is read at, timestamps that can be trusted, and frames on a uniform grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain, pairwise
from statistics import median_low

from vft.deferred import av

DEFAULT_RATE = Fraction(25)
# rates that a file may state
LOWEST_RATE, HIGHEST_RATE = Fraction(1, 100), Fraction(1000)
# a rate taken from the timestamps alone
MEASURED_LIMIT = Fraction(120)
# a frame that is shown for longer, in seconds, is a fault of its timestamps; so is a step back by so many intervals
LONGEST, BACK = 600, 2
# how far the rate is measured: packets and bytes
_PACKETS, _BYTES = 256, 1 << 24


def choose_rate(stream, packets: Iterator) -> tuple[Fraction, Iterator]:
    """Frames a second of the grid, and the packets with those put back that had to be looked at.

    The nominal rate, where the average agrees with it (a constant rate) or most intervals do; else one over the median
    interval, at most MEASURED_LIMIT.
    """
    nominal, average = stream.guessed_rate or stream.average_rate, stream.average_rate or stream.guessed_rate
    sane = nominal is not None and LOWEST_RATE <= nominal <= HIGHEST_RATE
    if sane and abs(average / nominal - 1) < 0.02:
        return nominal, packets
    taken, size = [], 0
    for packet in packets:
        taken.append(packet)
        size += packet.size
        if len(taken) == _PACKETS or size > _BYTES:
            break
    measured = measured_rate(sorted(p.pts for p in taken if p.pts is not None), stream.time_base)
    packets = chain(taken, packets)
    if measured is None:
        return (nominal if sane else DEFAULT_RATE), packets
    if sane and abs(measured / nominal - 1) < 0.05:
        return nominal, packets
    return measured, packets


def measured_rate(times: list[int], time_base: Fraction) -> Fraction | None:
    """One over the median interval of rising ticks, LOWEST_RATE to MEASURED_LIMIT; None without an interval."""
    intervals = [b - a for a, b in pairwise(times) if b > a]
    if not intervals:
        return None
    middle = median_low(intervals)
    # times are rounded to ticks, so equal intervals differ by one
    alike = [i for i in intervals if abs(i - middle) <= 1]
    rate = (1 / (Fraction(sum(alike), len(alike)) * time_base)).limit_denominator(1001)
    return min(max(rate, LOWEST_RATE), MEASURED_LIMIT)


def steady(
    frames: Iterable[av.VideoFrame],
    time_base: Fraction,
    rate: Fraction,
    note: Callable[[str], None],
    origin: int | None = None,
) -> Iterator[av.VideoFrame]:
    """Frames whose ``pts`` count from ``origin`` (None: from the first frame) and rise, in ``time_base``.

    A frame without a timestamp follows the one before it; a jump by more than LONGEST seconds, or back by more than
    BACK intervals, is closed and noted.
    """
    step, longest, back = (max(1, round(s / time_base)) for s in (1 / rate, LONGEST, BACK / rate))
    offset, last, length, jumps = origin, None, step, 0
    for frame in frames:
        follows = 0 if last is None else last + length
        pts = follows + (offset or 0) if frame.pts is None else frame.pts
        if offset is None:
            offset = pts
        if last is not None and not last - back <= pts - offset <= last + longest:
            jumps += 1
            offset = pts - follows
        last = pts - offset if last is None else max(pts - offset, last + 1)
        length = frame.duration if 0 < frame.duration <= longest else step
        frame.pts, frame.duration, frame.time_base = last, length, time_base
        yield frame
    if jumps:
        note(f"its timestamps jump {jumps} times; the frames there follow each other")


def on_grid(frames: Iterable[av.VideoFrame], time_base: Fraction, rate: Fraction, start: int = 0):
    """Frames of a uniform grid from its point ``start`` on, by FFmpeg's ``fps`` filter: each point shows the frame
    nearest to it in time or the last one before. A frame that is shown again shares its memory with the one before.
    """
    graph, last, shown = None, None, False
    for last in frames:
        if graph is None:
            graph = _fps_graph(last, time_base, rate, start)
        graph.vpush(last)
        for frame in pulled(graph):
            shown = True
            yield frame
    if graph is None:
        return
    graph.vpush(None)
    for frame in pulled(graph):
        shown = True
        yield frame
    # shorter than half a step, or it ends before ``start``
    if not shown:
        yield last


def _fps_graph(frame: av.VideoFrame, time_base: Fraction, rate: Fraction, start: int) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(template=frame, time_base=time_base)
    options = {"fps": str(rate), "round": "near"}
    if start:
        options["start_time"] = str(float(start / rate))
    graph.link_nodes(source, graph.add("fps", **options), graph.add("buffersink")).configure()
    return graph


def pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """The frames that a graph has ready."""
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):
            return
