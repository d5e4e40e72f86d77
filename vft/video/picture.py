"""Decoded frames to RGB of one size, by FFmpeg's filters: fields joined, upright, square pixels, SDR, opaque."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import numpy as np

from vft.deferred import av

from . import hdr
from .timing import pulled

# what lies behind transparent pixels; "premultiply" is that of black
BACKGROUND = (0, 0, 0)
# lines from which pictures that do not state their matrix count as BT.709
HD_LINES = 720
# AVCOL_SPC_*: RGB, BT.709, unspecified; values without a meaning
_BT709, _UNSPECIFIED = 1, 2
_UNKNOWN_SPACES = {3, *range(15, 256)}
# wider or narrower pixels are a fault of the header
_WIDEST = 8


def whole(frames: Iterable[av.VideoFrame], time_base: Fraction) -> Iterator[av.VideoFrame]:
    """Frames with both fields of one moment, by ``bwdif``, from the first frame on that is flagged as interlaced."""
    graph, kind = None, None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if kind != (kind := _kind(frame)):
            yield from _flushed(graph, time_base)
            graph = _graph(frame, time_base, ("bwdif", {"mode": "send_frame", "deint": "interlaced"}))
        graph.vpush(frame)
        yield from _timed(graph, time_base)
    yield from _flushed(graph, time_base)


def _flushed(graph: av.filter.Graph | None, time_base: Fraction) -> Iterator[av.VideoFrame]:
    if graph is not None:
        graph.vpush(None)
        yield from _timed(graph, time_base)


def _timed(graph: av.filter.Graph, time_base: Fraction) -> Iterator[av.VideoFrame]:
    # bwdif counts in halves of the time base
    for frame in pulled(graph):
        scale = frame.time_base / time_base
        frame.pts, frame.duration, frame.time_base = round(frame.pts * scale), round(frame.duration * scale), time_base
        yield frame


class Pictures:
    """Frames to uint8 ``[height, width, 3]``, the size of the first one.

    aspect: width of a pixel over its height, as stored. A frame of other properties than the one before it gets a graph
    of its own and is scaled to the size of the first.
    """

    def __init__(self, first: av.VideoFrame, aspect: Fraction | None, note: Callable[[str], None]) -> None:
        self.aspect = aspect if aspect and Fraction(1, _WIDEST) <= aspect <= _WIDEST else Fraction(1)
        self.note, self.noted = note, False
        self._graph, self._kind, self._count = None, None, 0
        self._held, self._picture = None, None
        width, height, aspect = first.width, first.height, self.aspect
        if _turns(_matrix(first))[1]:
            width, height, aspect = height, width, 1 / aspect
        self.width, self.height = max(1, int(width * aspect)), height

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        # a frame that the grid shows again lies in the same memory, which is kept for as long
        if self._held is None or frame.planes[0].buffer_ptr != self._held.planes[0].buffer_ptr:
            self._held, self._picture = frame, self._converted(frame)
        return self._picture

    def _converted(self, frame: av.VideoFrame) -> np.ndarray:
        kind = _kind(frame), _matrix(frame)
        if kind != self._kind:
            self._graph, self._kind, self._count = self._make(frame), kind, 0
        _tag(frame)
        frame.pts, frame.time_base = self._count, Fraction(1, 25)
        self._count += 1
        self._graph.vpush(frame, 0)
        return self._graph.vpull().to_ndarray()

    def _make(self, frame: av.VideoFrame) -> av.filter.Graph:
        filters = list(_turns(_matrix(frame))[0])
        scale = ("scale", {"w": str(self.width), "h": str(self.height), "flags": "bilinear"})
        table = None
        if frame.color_trc in (hdr.PQ, hdr.HLG):
            table = self._table(frame)
        if table is not None:
            filters += [scale, ("format", "rgb48le")]
            return _graph(frame, Fraction(1, 25), *filters, table=table)
        if any(component.is_alpha for component in frame.format.components):
            filters += [("format", "gbrap16le"), ("premultiply", {"inplace": "1"})]
        return _graph(frame, Fraction(1, 25), *filters, scale, ("format", "rgb24"))

    def _table(self, frame: av.VideoFrame) -> av.VideoFrame | None:
        if "haldclut" in av.filter.filters_available:
            return hdr.table(int(frame.color_trc), int(frame.color_primaries))
        if not self.noted:
            self.noted = True
            self.note("its high dynamic range is not mapped (this FFmpeg has no haldclut filter): the frames are grey")
        return None


def _graph(frame: av.VideoFrame, time_base: Fraction, *filters, table: av.VideoFrame | None = None) -> av.filter.Graph:
    """buffer -> filters -> [haldclut with ``table`` -> rgb24] -> sink"""
    _tag(frame)
    graph = av.filter.Graph()
    source = graph.add(
        "buffer", video_size=f"{frame.width}x{frame.height}", pix_fmt=frame.format.name, time_base=str(time_base),
        pixel_aspect="1/1", colorspace=str(int(frame.colorspace)), range=str(int(frame.color_range)),
    )  # fmt: skip
    nodes = [source]
    for name, options in filters:
        nodes.append(graph.add(name, options) if isinstance(options, str) else graph.add(name, **options))
    sink = graph.add("buffersink")
    if table is not None:
        second = graph.add_buffer(template=table, time_base=time_base)
        nodes.append(graph.add("haldclut", interp="tetrahedral"))
        second.link_to(nodes[-1], 0, 1)
        nodes.append(graph.add("format", "rgb24"))
    graph.link_nodes(*nodes, sink).configure()
    if table is not None:
        table.pts, table.time_base = 0, time_base
        second.push(table)
        second.push(None)
    return graph


def _kind(frame: av.VideoFrame) -> tuple:
    return (
        frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, frame.color_trc,
        frame.color_primaries,
    )  # fmt: skip


def _tag(frame: av.VideoFrame) -> None:
    """States the colour matrix that a frame most likely has where it does not say, as players do."""
    if frame.colorspace in _UNKNOWN_SPACES:
        frame.colorspace = _UNSPECIFIED
    if frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb and min(frame.width, frame.height) >= HD_LINES:
        frame.colorspace = _BT709


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of the display matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y), up to a shift."""
    data = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if data is None or data.buffer_size < 20:
        return 1, 0, 0, 1
    values = np.frombuffer(data, np.int32, 5)
    return int(values[0]), int(values[1]), int(values[3]), int(values[4])


def _turns(matrix: tuple[int, int, int, int]) -> tuple[list[tuple[str, dict]], bool]:
    """The filters that show a frame as its matrix says, to the nearest of eight; whether its sides change places."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        flips = [("hflip", {})] * (a < 0) + [("vflip", {})] * (d < 0)
        return flips, False
    directions = {(True, True): "cclock_flip", (True, False): "clock", (False, True): "cclock"}
    return [("transpose", {"dir": directions.get((b > 0, c > 0), "clock_flip")})], True
