"""Modes under which nothing may wait for a device or copy from the host: tensors of "meta", which have no values to
read, stand in the device's place."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# on a GPU their results have a size that only the values tell
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "item"}
MAKING = (torch.tensor, torch.as_tensor, torch.from_numpy)


class HostCopyError(RuntimeError):
    pass


class NoHostCopies(TorchDispatchMode):
    """Raises where an op waits for values on "meta", or a tensor goes there from the CPU or back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # a number is a tensor of no dimensions on the CPU, which a launch takes by value
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        if func in (aten._to_copy.default, aten.empty_like.default) and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        name = func.overloadpacket.__name__
        if "meta" in devices and (len(devices) > 1 or name in WAITING):
            raise HostCopyError(f"{func} on {', '.join(sorted(devices))}")
        return func(*args, **kwargs)


class NoHostData(TorchFunctionMode):
    """Raises where a tensor on "meta" is made of numbers of the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in MAKING and device is not None and torch.device(device).type == "meta":
            raise HostCopyError(f"{func.__name__} of host data")
        return func(*args, **kwargs)


def forbidden(call):
    with NoHostCopies(), NoHostData():
        return call()
