"""Where ops are defined: an `Op` is one row with everything that belongs to it, and chooses who serves a call.

`flexkernels.<op>` calls its Op, which calls `torch.ops.flexkernels.<op>`. On a CPU or a CUDA device that is the C++ op
of csrc/ops, which checks, allocates and launches: one dispatch. What needs more takes its own road:

    a gradient                  the autograd formula registered on the op, whose backward is an Op too
    torch.compile, FakeTensor   the same op, by its `fake`
    torch.func, forward mode    the reference formula, which PyTorch differentiates
    a forced backend, Triton    torch.ops.flexkernels_select.<op>: the same op, its backend chosen in Python
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from . import _native, checks

NAMESPACE = "flexkernels"
# the same ops, but Python chooses the backend
SELECT = "flexkernels_select"
BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "FLEXKERNELS_BACKEND"
OPS: dict[str, Op] = {}
QUERIES: dict[str, Query] = {}
# tests: the namespace whose CPU kernels are the CUDA sources in an emulator; they serve "cuda" on CPU tensors
emulated: str | None = None

_library = {space: torch.library.Library(space, "FRAGMENT") for space in (NAMESPACE, SELECT)}


class Op:
    """One op: its schema, its checks, its backends and its derivatives.

    Every callable takes the schema's arguments in their order, several tensors as a list.
    check: raises TypeError or ValueError for wrong input. The C++ op checks what it needs itself, in a RuntimeError;
        `check` runs where it refused, to say the same in the words of the public function, and before every other road.
    check_values: raises for what only the values of tensors tell, offsets say. The C++ op looks at them too; on devices
        where that waits, both do under FLEXKERNELS_CHECK=1 alone.
    reference: plain PyTorch, returns the results. fake: their shapes and dtypes alone.
    triton: the module of flexkernels.triton that has `<name>_triton`, which returns the results; None: there is none.
    cuda_order: what `auto` tries on a CUDA device, as measured. The reference comes last everywhere.
    unsupported: {backend: why it cannot serve these arguments, or None where it can}.
    setup_context, backward: the gradient, as torch.library.register_autograd takes them. Without them a gradient
        through the op raises NotImplementedError.
    lists: backward gives lists of gradients for lists of tensors, rather than None.
    inference: a call with a tensor that needs a gradient raises RuntimeError at once.
    jvp: what is computed, and differentiated by PyTorch, for forward-mode derivatives and nested transforms of
        torch.func: the reference unless given. None raises NotImplementedError.
    plain: the reference serves whatever backend is asked for: of an op only so that a compiler leaves it as it is.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        check: Callable[..., None],
        check_values: Callable[..., None] | None = None,
        reference: Callable,
        fake: Callable,
        triton: str | None = None,
        cuda_order: tuple[str, ...] = ("cuda", "triton"),
        unsupported: dict[str, Callable] | None = None,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
        lists: bool = False,
        inference: bool = False,
        jvp: Callable | str | None = "reference",
        plain: bool = False,
    ):
        self.name, self.schema, self.reference, self.triton = name, schema, reference, triton
        self.check, self.check_values, self.in_place = check, check_values, "!" in schema
        self.orders = {"cpu": ("cpu", "reference"), "cuda": (*cuda_order, "reference")}
        self.unsupported = unsupported or {}
        self.plain, self.inference = plain, inference
        self.jvp = reference if jvp == "reference" else jvp
        self.direct, self.selected = (
            self._define(space, schema, fake, setup_context, backward, lists) for space in (NAMESPACE, SELECT)
        )
        # with CUDA kernels loaded, Python chooses on CUDA devices unless the C++ op is simply the one to take
        self.always_direct = cuda_order[0] == "cuda" or _native.cuda_unavailable is not None
        self.written = [i for i, argument in enumerate(self.direct._schema.arguments) if argument.is_write]
        OPS[name] = self

    def __call__(self, *args):
        if self.inference and torch.is_grad_enabled() and needs_gradient(args):
            raise RuntimeError(f"flexkernels.{self.name} has no gradient: call it under torch.no_grad()")
        if torch.compiler.is_compiling():
            self.check(*args)
            return self._overload(args)(*args)
        op = self._overload(args)
        try:
            if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
                return op(*args)
            # the autograd kernel of an op is Python: three times what the rest of a small call takes
            with torch._C._AutoDispatchBelowAutograd():
                results = op(*args)
        except (RuntimeError, TypeError):
            self._check_all(args)
            raise
        if self.in_place:
            self._note_writes(args)
        return results

    def _check_all(self, args):
        self.check(*args)
        if self.check_values is not None and checks.values_are_checked(_first_tensor(args)):
            self.check_values(*args)

    def _overload(self, args):
        direct = _forced == "auto" and (self.always_direct or _device(args).type != "cuda")
        return self.direct if direct else self.selected

    def _define(self, space: str, schema: str, fake, setup_context, backward, lists: bool):
        library, qualified = _library[space], f"{space}::{self.name}"
        library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(self.name, self._select, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, functools.partial(self._fake, fake), lib=library)
        overload = getattr(getattr(torch.ops, space), self.name).default
        # what torch.library.register_autograd registers, behind what it leaves out
        backward = backward or self._no_gradient
        if lists:
            formula = make_autograd_impl(overload, Info(backward, setup_context))
        else:
            formula = _formula(overload, setup_context, backward)
        kernel = functools.partial(self._differentiable, formula)
        library.impl(self.name, kernel, "Autograd", with_keyset=True)
        return overload

    def _differentiable(self, formula, keyset, *args):
        """The op where derivatives may be asked for: its autograd kernel."""
        needs_gradient = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if self.in_place and needs_gradient:
            checks.reject(f"tensors of flexkernels.{self.name}", "need no gradient in place", "requires_grad=True")
        # formulas do not nest in transforms of torch.func, and PyTorch would leave tangents out without a word
        nested = needs_gradient and torch._C._are_functorch_transforms_active()
        if nested or _asks_for_tangents(args):
            return self._by_pytorch(args)
        results = formula(keyset, *args)
        if self.in_place:
            self._note_writes(args)
        return results

    def _by_pytorch(self, args):
        """The op by a formula that PyTorch differentiates."""
        self.check(*args) if torch.compiler.is_compiling() else self._check_all(args)
        if self.jvp is None:
            raise NotImplementedError(f"flexkernels.{self.name} has no such derivative (torch.func, forward mode)")
        return _contiguous(self.jvp(*args))

    def _note_writes(self, args):
        # so that autograd refuses a backward that needs what was overwritten
        torch.autograd.graph.increment_version([args[i] for i in self.written])

    def _fake(self, fake, *args):
        # tensors of meta beside others come here too
        if len({arg.device for arg in args if isinstance(arg, torch.Tensor)}) > 1:
            self.check(*args)
        return fake(*args)

    def _no_gradient(self, ctx, *grads):
        raise NotImplementedError(f"flexkernels.{self.name} has no derivative of this order")

    def _select(self, *args):
        """The op on the forced backend, or on the first of the device's that serves the call."""
        self._check_all(args)
        if self.plain:
            return _contiguous(self.reference(*args))
        device = _device(args)
        names = self.orders.get(device.type, ("reference",)) if _forced == "auto" else (_forced,)
        reasons = []
        for name in names:
            reason = self._refusal(name, device, args)
            if reason is None:
                results = self._backend(name, device)(*args)
                return _contiguous(results) if name == "reference" else results
            reasons.append(f"{name}: {reason}")
        asked = "no backend can" if _forced == "auto" else f"the forced backend {_forced!r} cannot"
        raise RuntimeError(f"flexkernels.{self.name}: {asked} serve this call on {device} ({'; '.join(reasons)})")

    def _backend(self, name: str, device: torch.device) -> Callable | None:
        if name == "reference":
            return self.reference
        if name == "triton":
            # imported at its first call: Triton takes long, and a CPU does not need it
            module = self.triton and importlib.import_module(f"{__package__}.triton.{self.triton}")
            return getattr(module, f"{self.name}_triton") if module else None
        if name == "cuda" and device.type == "cpu":
            return getattr(getattr(torch.ops, emulated), self.name) if _has_native(emulated, self.name, "CPU") else None
        return self.direct if _has_native(NAMESPACE, self.name, name.upper()) else None

    def _refusal(self, name: str, device: torch.device, args) -> str | None:
        """Why backend `name` cannot serve `args`, or None."""
        reason = _cannot_run(name, device)
        if reason is None and self._backend(name, device) is None:
            reason = f"it has no {self.name}"
        if reason is None and name in self.unsupported:
            reason = self.unsupported[name](*args)
        return reason


def _formula(op, setup_context: Callable | None, backward: Callable) -> Callable:
    """What torch.library.register_autograd registers, for an op without keyword arguments whose lists of tensors have
    no gradient: looking for both takes longer than the rest of a small call."""
    defaults = [argument.default_value for argument in op._schema.arguments]

    def forward(ctx, *args):
        *args, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            results = op.redispatch(keyset, *args)
            if setup_context is not None:
                # the dispatcher leaves out arguments that equal their defaults
                setup_context(ctx=ctx, inputs=(*args, *defaults[len(args) :]), output=results)
        return results

    def grads_of(ctx, *grads):
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = needed[:-1]
        try:
            results = backward(ctx, *grads)
        finally:
            # it stays for another backward through the same graph
            ctx.needs_input_grad = needed
        return (*results, None) if isinstance(results, tuple) else (results, None)

    # named for profilers, which show "<op>Backward"
    methods = {"forward": staticmethod(forward), "backward": staticmethod(grads_of)}
    function = type(op._opname, (torch.autograd.Function,), methods)

    def call(keyset, *args):
        keyset = keyset & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset, *args)

    return call


class Query:
    """What only the C++ of a device knows about a call: an op that computes nothing and returns a text."""

    def __init__(self, name: str, schema: str):
        self.name, self.schema = name, schema
        _library[NAMESPACE].define(name + schema)
        QUERIES[name] = self

    def __call__(self, *args) -> str:
        device = _device(args)
        space = emulated if emulated and _forced == "cuda" and device.type == "cpu" else NAMESPACE
        if not _has_native(space, self.name, device.type.upper()):
            return f"there are no native kernels for {device.type}"
        return getattr(getattr(torch.ops, space), self.name)(*args)


def current_backend() -> str:
    """The backend in force: the innermost `with backend(...)`, else FLEXKERNELS_BACKEND at import, else "auto"."""
    return _forced


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend ("reference", "cpu", "triton", "cuda") or "auto" inside the `with` block, in every thread.

    A forced backend that cannot serve a call raises RuntimeError saying why; nothing falls back silently.
    Raises ValueError for any other name.
    """
    global _forced
    before, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = before


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None when it can run on this machine and otherwise the reason why it cannot."""
    return {name: _unavailable(name) for name in BACKENDS}


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (on CPU tensors, slowly: for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _known(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


# of the whole process: autograd runs the backward on CUDA devices in threads of its own
_forced = _known(os.environ.get(ENVIRONMENT) or "auto")


def _may_have_tangents() -> bool:
    """Whether a look for tangents is worth its time: there is a dual level, or PyTorch is tracing or in torch.func."""
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return True
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.FuncTorchDynamicLayerBackMode)


def _asks_for_tangents(args) -> bool:
    if not _may_have_tangents():
        return False
    # looking makes views, which have no place in a graph that is being traced
    with disable_proxy_modes_tracing():
        return _has_tangent(args)


def _has_tangent(args) -> bool:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if forward_ad.unpack_dual(arg, level=0).tangent is not None:
                return True
        elif isinstance(arg, list) and _has_tangent(arg):
            return True
    return False


def _contiguous(results):
    if isinstance(results, torch.Tensor):
        return results.contiguous()
    return results and tuple(_contiguous(result) for result in results)


def _first_tensor(args) -> torch.Tensor | None:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
    return None


def needs_gradient(args) -> bool:
    """What torch._C._any_requires_grad says, for torch.compile to trace."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and needs_gradient(arg):
            return True
    return False


def _device(args) -> torch.device:
    """That of the first tensor; the CPU where there is none, which the checks refuse."""
    first = _first_tensor(args)
    return torch.device("cpu") if first is None else first.device


@functools.cache
def _has_native(space: str, name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{space}::{name}", key)


def _cannot_run(name: str, device: torch.device) -> str | None:
    if name == "cuda" and device.type == "cpu" and emulated:
        return None
    return _unavailable(name) or _wrong_device(name, device)


def _wrong_device(name: str, device: torch.device) -> str | None:
    if name == "reference" or name == device.type or (name == "triton" and device.type == "cuda"):
        return None
    if name == "triton" and device.type == "cpu":
        return None if interpreting() else "it runs on CPU tensors only under TRITON_INTERPRET=1"
    return f"it does not run on {device.type} tensors"


def _unavailable(name: str) -> str | None:
    if name == "triton":
        return _triton_missing() or _triton_idle()
    if name == "cpu":
        return _native.cpu_unavailable
    return _native.cuda_unavailable if name == "cuda" else None


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _triton_idle() -> str | None:
    if interpreting() or torch.cuda.is_available():
        return None
    return "no GPU is available (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
