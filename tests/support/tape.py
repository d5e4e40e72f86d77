"""CUDA graphs on the CPU: a capture notes every op with its tensors and computes nothing; a replay runs what was noted.

As on a GPU, a replay reads and writes the memory of the capture and has its Python numbers from there; what a captured
op returns holds NaN until a replay fills it. Ops that wait for the device fail in a capture.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# on a GPU these wait for the device
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


def tensors(values) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


class Graph(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph; ``calls`` are its launches, ``replays`` how often it ran."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITING:
            raise RuntimeError(f"{func} waits for the device in a capture")
        if func.is_view or func in (aten.empty.memory_format, aten.empty_strided.default, aten.detach.default):
            out = func(*args, **kwargs)
            if not func.is_view:
                _poison(out)
            return out
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs, None))
            # what it writes to it returns, if anything
            written = [i for i, a in enumerate(func._schema.arguments) if a.is_write]
            named = {a.name: i for i, a in enumerate(func._schema.arguments)}
            values = [*args, *[kwargs.get(name) for name, i in named.items() if i >= len(args)]]
            return values[written[0]] if func._schema.returns else None
        out = func(*args, **kwargs)
        shared = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        fresh = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in shared]
        _poison(fresh)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for mine, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=out is not None):
                    if mine.data_ptr() != new.data_ptr():
                        mine.copy_(new)


def _poison(values) -> None:
    for t in tensors(values):
        if t.is_floating_point():
            t.fill_(torch.nan)


@contextlib.contextmanager
def capturing(graph, pool=None):
    """In place of torch.cuda.graph."""
    with graph:
        yield


def install(monkeypatch) -> list[Graph]:
    """Puts these in the place of torch's; the list gets every graph that is made."""
    made = []

    def graph():
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


class Counting(TorchDispatchMode):
    """How many ops that are no views run under it, outside of replays."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
