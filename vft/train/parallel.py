"""Several processes on torch's own engine: started by ``torchrun``, a model is replicated (DDP) or sharded (FSDP2).

Each process computes its slice of the global batch; gradients are averaged, so the losses are those of one process up
to float rounding. Saved states hold whole tensors: they are read by any number of processes, in either mode.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .. import generator, layers
from ..batch import shard

MODES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Group:
    """The processes of a run: this one's rank and device, their number, and the mode, None for a single process."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mode: str | None = None

    def parts(self, batch: int, accumulate: int) -> list[slice]:
        """This process's micro-batches of a global batch. Raises ValueError where they would not be equal."""
        pieces = self.size * accumulate
        if accumulate < 1 or batch % pieces:
            raise ValueError(f"batch {batch} must be a multiple of {self.size} processes x {accumulate} accumulations")
        count = batch // pieces
        first = self.rank * accumulate
        return [slice((first + i) * count, (first + i + 1) * count) for i in range(accumulate)]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all processes."""
        if self.mode is not None:
            dist.all_reduce(value)
            value /= self.size
        return value

    def agree(self, flag: bool) -> bool:
        """What rank 0 says."""
        if self.mode is None:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.broadcast(value, 0)
        return bool(value)


@contextlib.contextmanager
def joined(mode: str | None, device: str) -> Iterator[Group]:
    """The group of this process: all that ``torchrun`` started (DDP where no mode is given), else itself alone.

    A process group that exists already is used and left as it is. Raises ValueError for a mode without torchrun, an
    unknown mode or a device that is not there.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"parallel must be one of {', '.join(MODES)}, got {mode!r}")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not available on this machine")
    rank, size = shard()
    if "RANK" not in os.environ:
        if mode is not None:
            raise ValueError(
                f"parallel {mode} needs several processes: torchrun --nproc-per-node N -m vft.cli train ..."
            )
        yield Group(place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Group(place, rank, size, mode or "ddp")
    finally:
        if started:
            dist.destroy_process_group()


class Loss(nn.Module):
    """A task's loss as a module, which is what DDP and FSDP wrap."""

    def __init__(self, task) -> None:
        super().__init__()
        self.model, self.task = task.model, task

    def forward(self, generator: torch.Generator, part: slice) -> torch.Tensor:
        return self.task.loss(generator, part)


def spread(task, group: Group) -> nn.Module:
    """The task's :class:`Loss` over the group; FSDP replaces the model's parameters by their shards."""
    loss = Loss(task)
    if group.mode == "ddp":
        # a batch without a dropped condition leaves the null parameters unused; buffers are constants
        return DistributedDataParallel(loss, find_unused_parameters=True, broadcast_buffers=False)
    if group.mode == "fsdp":
        mesh = dist.init_device_mesh(group.device.type, (group.size,))
        for unit in _units(task.model):
            fully_shard(unit, mesh=mesh)
        fully_shard(loss, mesh=mesh)
    return loss


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are gathered together while they run."""
    for module in list(model.modules()):
        if isinstance(module, generator.Block):
            yield module
            register_fsdp_forward_method(module, "packed")
        elif isinstance(module, layers.Block):
            yield from (module.attn, module.mlp)
            if module.adaLN_modulation is not None:
                yield module.adaLN_modulation[1]


@contextlib.contextmanager
def synchronised(loss: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are averaged over the group in the last backward of a step alone."""
    if isinstance(loss, DistributedDataParallel) and not last:
        with loss.no_sync():
            yield
        return
    if hasattr(loss, "set_requires_gradient_sync"):
        loss.set_requires_gradient_sync(last)
    yield


def local(x: torch.Tensor) -> torch.Tensor:
    """This process's shard of a parameter, which shares its memory; the parameter itself where it is whole."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A shard (or whole tensor) of the parameter ``like``, gathered. All processes must call it."""
    if not isinstance(like, DTensor):
        return x
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return x.full_tensor()


def scatter(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`whole`: a DTensor spread as ``like`` is, or x itself, on the device of ``like``."""
    if not isinstance(like, DTensor):
        return x.to(like.device)
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
