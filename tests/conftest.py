"""The whole suite runs with torch.empty full of NaN, so an output that no kernel wrote fails its test."""

import os
import sys

import emulator
import pytest
import torch

# without a GPU the Triton kernels run in the interpreter; Triton reads this once, when a kernel file is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# what the C++ ops allocate
os.environ.setdefault("FLEXKERNELS_POISON", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def poisoned_memory():
    # deterministic mode is what makes torch fill new memory: NaN for floats, the largest value for integers
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    # graphs of one test must not count towards another's limit of recompilations
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def emulated_kernels(request):
    if request.node.get_closest_marker("emulator") is None:
        yield
        return
    reason = emulator.unavailable()
    if reason:
        pytest.skip(f"emulator: {reason}")
    made_before = [vars(request.module), getattr(request.node, "callspec", None) and request.node.callspec.params]
    with emulator.emulated_ops(made_before):
        yield
