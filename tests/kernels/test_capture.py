"""No op waits for its device or copies from the host: captured in a CUDA graph on a GPU; elsewhere under modes that
forbid it, with tensors of "meta", which have no values to read, in the GPU's place."""

import importlib
import sys

import pytest
import torch
from capture_calls import CALLS
from helpers import needs_gpu
from host_copies import HostCopyError, forbidden
from torch.utils._pytree import tree_leaves

import flexkernels
from flexkernels import library


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_copied_or_waited_for(name):
    call = CALLS[name]("meta")
    # tables and layouts are made, and go to the device, at a first call
    call()
    forbidden(call)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x + torch.ones(2),
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.sum() > 0),
    ],
)
def test_what_is_forbidden_is_seen(what):
    with pytest.raises((HostCopyError, RuntimeError, NotImplementedError)):
        forbidden(lambda: what(torch.ones(2, device="meta")))


def test_numbers_and_work_on_the_device_are_allowed():
    x = torch.ones(2, device="meta")
    assert forbidden(lambda: torch.cat([2 * x + torch.full((2,), 3.0, device="meta"), x.bfloat16().float()])).shape == (
        4,
    )


class Launched:
    """In a kernel's place: launched with any grid, does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def schema_calls(monkeypatch):
    """The (op, schema arguments) of every Op that is called."""
    found, real = [], library.Op.__call__
    monkeypatch.setattr(library.Op, "__call__", lambda op, *args: found.append((op, args)) or real(op, *args))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_triton_launches_without_copies(name, schema_calls, monkeypatch):
    pytest.importorskip("triton")
    CALLS[name]("meta")()
    if not schema_calls:
        pytest.skip("the call reaches no library.Op")
    for op, args in schema_calls:
        if op.triton is None:
            continue
        module = importlib.import_module(f"flexkernels.triton.{op.triton}")
        # an op may launch the kernels of others
        for part in [m for key, m in sys.modules.items() if key.startswith("flexkernels.triton.")]:
            for kernel in [key for key in vars(part) if key.endswith("_kernel")]:
                monkeypatch.setattr(part, kernel, Launched())
        launch = getattr(module, f"{op.name}_triton", None)
        if launch is None:
            continue
        launch(*args)
        forbidden(lambda launch=launch, args=args: launch(*args))


def test_every_public_op_is_called():
    ops = {name for name in flexkernels.__all__ if f"{name.removesuffix('_')}_ref" in dir(flexkernels)}
    ops |= {name for name in flexkernels.__all__ if name.endswith("_") and not name.endswith(("_ref_", "__"))}
    assert len(ops) > 15 and sorted(ops - {name.split()[0] for name in CALLS}) == []


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_captured_in_a_cuda_graph(name):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call = CALLS[name]("cuda")
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = call()
        graph.replay()
        torch.cuda.synchronize()
    for each in tree_leaves(out):
        if isinstance(each, torch.Tensor) and each.is_floating_point():
            assert torch.isfinite(each).all()
