"""Where the time of a call goes, op by op, and the least that each op could take on this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from flexkernels.layout import LayoutTensors
from flexkernels.library import NAMESPACE

from .files import replacing
from .measure import bound_ms, synchronize

CALLS = 3
# what :func:`labelled` calls a part in a recording
_PART = "part: "
# what autograd calls a node of a backward pass
_NODE = "autograd::engine::evaluate_function"
_OURS = f"{NAMESPACE}::"
# how much of their inputs these read depends on the numbers in them
_UNKNOWN = {
    "aten::embedding", "aten::index", "aten::index_put_", "aten::index_select", "aten::gather",
    f"{_OURS}decode_attention", f"{_OURS}kv_append_",
}  # fmt: skip
_BESIDE = "(outside of ops)"


@dataclass
class Row:
    """One op: how often a call runs it, its milliseconds a call, and its bound, None where that is not known."""

    name: str
    calls: float
    ms: float
    bound_ms: float | None = None


@dataclass
class Profile:
    """Ops by falling time; kernels {name: ms}, on a GPU alone; ms, the whole call under the profiler; parts {name: ms}
    of what was :func:`labelled`."""

    ops: list[Row]
    kernels: dict[str, float]
    ms: float
    parts: dict[str, float]


@torch.no_grad()
def profile(function: Callable, device: str, ceiling: dict[str, float], trace: Path | None = None) -> Profile:
    """Profiles CALLS calls of ``function``, after one that counts bytes and flops; writes a Chrome trace (JSON).

    ceiling: what :func:`vft.measure.ceilings` gives. On a GPU an op has the time of the kernels that it launches.
    """
    with Bounds(ceiling) as bounds:
        function()
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        synchronize(device)
        ms = 1000 * (time.perf_counter() - start) / CALLS
    if trace is not None:
        with replacing(trace) as temporary:
            recorded.export_chrome_trace(str(temporary))
    return summarize(recorded.events(), device, bounds, ms)


def summarize(events, device: str, bounds: Bounds, ms: float) -> Profile:
    """The rows of CALLS calls that took ``ms`` each."""
    times, counts, kernels, parts = Counter(), Counter(), Counter(), Counter()
    for event in events:
        if (part := _part(event)) is not None:
            ms_of = (event.device_time_total if device == "cuda" else event.cpu_time_total) / 1000 / CALLS
            parts[part] += ms_of
            if (around := _enclosing(event)) is not None:
                parts[around] -= ms_of
        if event.device_type != DeviceType.CPU:
            kernels[event.name] += event.device_time_total / 1000 / CALLS
        elif event.cpu_parent is None:
            _add(event, device == "cuda", times, counts)
    ops = [Row(name, counts[name] / CALLS, us / 1000 / CALLS, bounds.ms.get(name)) for name, us in times.items() if us]
    ops.sort(key=lambda row: -row.ms)
    ops.append(Row(_BESIDE, 0, max(0.0, ms - sum(row.ms for row in ops))))
    return Profile(ops, dict(kernels.most_common()), ms, dict(parts))


def _part(event) -> str | None:
    """Which part an event is, if any; of a backward pass, which has a thread of its own on a GPU, each node is one."""
    if event.device_type == DeviceType.CPU and event.name.startswith(_NODE):
        return "backward"
    if event.device_type == DeviceType.CPU and event.name.startswith(_PART):
        return event.name.removeprefix(_PART)
    return None


def _enclosing(event) -> str | None:
    """The innermost part that an event is in."""
    while (event := event.cpu_parent) is not None:
        if (part := _part(event)) is not None:
            return part
    return None


@contextmanager
def labelled(parts: Iterable[tuple[str, object, str]]) -> Iterator[None]:
    """Recordings know the calls of methods as parts: (part, object, name of its method) each."""
    before = []
    try:
        for part, owner, name in parts:
            method, own = getattr(owner, name), name in vars(owner)
            before.append((owner, name, method, own))
            setattr(owner, name, _recorded(_PART + part, method))
        yield
    finally:
        for owner, name, method, own in reversed(before):
            setattr(owner, name, method) if own else delattr(owner, name)


def _recorded(label: str, method: Callable) -> Callable:
    def call(*args, **kwargs):
        with torch.profiler.record_function(label):
            return method(*args, **kwargs)

    return call


def _add(event, on_gpu: bool, times: Counter, counts: Counter) -> None:
    """Adds the microseconds of an event and of those inside it; an op of ours is one row with all that it calls."""
    if event.name.startswith(_PART):
        # its own time is outside of ops
        for inside in event.cpu_children:
            _add(inside, on_gpu, times, counts)
        return
    whole = event.name.startswith(_OURS)
    if on_gpu:
        us = event.device_time_total if whole else event.self_device_time_total
    else:
        us = event.cpu_time_total if whole else event.self_cpu_time_total
    times[event.name] += us
    counts[event.name] += 1
    for inside in () if whole else event.cpu_children:
        _add(inside, on_gpu, times, counts)


class Bounds(TorchDispatchMode):
    """Sums the bound of every op that runs under it, by name, in ``ms``; None where one call's is not known."""

    def __init__(self, ceiling: dict[str, float]) -> None:
        super().__init__()
        self.ceiling, self.ms = ceiling, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name
        if function.is_view or name.startswith("aten::empty"):
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if name in _UNKNOWN or not tensors:
            self.ms[name] = None
        elif (before := self.ms.get(name, 0.0)) is not None:
            moved, flops = footprint(tensors), flops_of(function, args, kwargs, out)
            self.ms[name] = before + bound_ms(moved, flops, tensors[0].dtype, self.ceiling)
        return out


def footprint(tensors) -> int:
    """Bytes of all tensors together, one that occurs twice counted once, and what is expanded as what it is made of."""
    found = {}
    for x in tensors:
        count = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            count *= size if stride else min(size, 1)
        found[x.data_ptr(), count] = count * x.element_size()
    return sum(found.values())


def flops_of(function, args, kwargs, out) -> int:
    """Multiplications and additions of a product or an attention, 0 for any other op."""
    name = function._schema.name
    if name == f"{_OURS}attention":
        q, heads_dim = args[0], args[0].shape[1] * args[0].shape[2]
        return 4 * heads_dim * pairs(args[3]) if len(q) else 0
    if name == f"{_OURS}skinny_linear":
        return 2 * len(args[0]) * args[1].numel()
    if name == f"{_OURS}fsq_project_quantize":
        return 2 * len(args[0]) * args[1].numel()
    count = flop_registry.get(function._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


def pairs(layout) -> int:
    """Query-key pairs of the tiles that attention under a layout's tensors visits."""
    t = LayoutTensors(*layout)
    rows = t.tiles[:, 2] - t.tiles[:, 1]
    lengths = torch.nn.functional.pad((t.runs[:, 1] - t.runs[:, 0]).long().cumsum(0), (1, 0))
    keys = lengths[t.ptr[1:].long()] - lengths[t.ptr[:-1].long()]
    return int((rows * keys).sum())


def parts_table(found: Profile) -> str:
    """The parts that were :func:`labelled`, and what is beside them: on a GPU, where it runs none of their kernels."""
    rest = max(0.0, found.ms - sum(found.parts.values()))
    rows = [*sorted(found.parts.items(), key=lambda part: -part[1]), ("host and the rest", rest)]
    lines = [f"{'part':<44} {'ms':>9} {'share':>7}"]
    return "\n".join([*lines, *(f"{name:<44} {ms:9.3f} {ms / found.ms:7.1%}" for name, ms in rows)])


def table(found: Profile, top: int) -> str:
    """The ``top`` ops, the rest as one row, and the kernels of a GPU."""
    lines = [f"{'op':<44} {'calls':>7} {'ms':>9} {'share':>7} {'bound ms':>9} {'of bound':>9}"]
    ops, rest = found.ops[:top], found.ops[top:]
    if rest:
        ops = [*ops, Row(f"({len(rest)} more)", sum(row.calls for row in rest), sum(row.ms for row in rest))]
    lines += [_line(row, found.ms) for row in ops]
    known = [row.bound_ms for row in found.ops if row.bound_ms is not None]
    lines.append(_line(Row("total", sum(row.calls for row in found.ops), found.ms, sum(known)), found.ms))
    if found.kernels:
        lines += ["", f"{'kernel':<84} {'ms':>9} {'share':>7}"]
        lines += [f"{k[:84]:<84} {ms:9.3f} {ms / found.ms:7.1%}" for k, ms in [*found.kernels.items()][:top]]
    return "\n".join(lines)


def _line(row: Row, total: float) -> str:
    bound = of_bound = "-"
    if row.bound_ms is not None and row.ms:
        bound, of_bound = f"{row.bound_ms:.3f}", f"{row.bound_ms / row.ms:.0%}"
    calls = f"{row.calls:.0f}" if row.calls else ""
    return f"{row.name[:44]:<44} {calls:>7} {row.ms:9.3f} {row.ms / total:7.1%} {bound:>9} {of_bound:>9}"
