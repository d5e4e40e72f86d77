import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import needs_gpu

import flexkernels
from flexkernels import library

NAMES = {"reference", "cpu", "triton", "cuda"}


@pytest.fixture
def calls(monkeypatch):
    """An op `probe` whose backends for the CPU only note their name; its `cpu` refuses odd lengths."""
    seen = []
    monkeypatch.setattr(library._native, "cpu_unavailable", None)
    probe = library.Op.__new__(library.Op)
    probe.name, probe.plain, probe.check, probe.check_values = "probe", False, lambda x: None, None
    probe.orders = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
    probe.unsupported = {"cpu": lambda x: "odd length" if len(x) % 2 else None}
    backends = {name: lambda x, name=name: seen.append(name) for name in ("cpu", "reference")}
    monkeypatch.setattr(library.Op, "_backend", lambda op, name, device: op.backends.get(name))
    probe.backends, probe.seen = backends, seen
    return probe


def test_empty_memory_is_poisoned():
    assert torch.empty(100).isnan().all()
    assert torch.zeros(3).new_empty(100).isnan().all()
    assert (torch.empty(100, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_names_every_backend_and_says_why_one_is_missing():
    available = flexkernels.available_backends()
    assert set(available) == NAMES
    assert available["reference"] is None
    assert all(reason is None or len(reason) > 5 for reason in available.values())
    if not torch.cuda.is_available():
        assert available["cuda"] is not None


def test_auto_takes_the_best_row_that_serves_the_call(calls):
    calls._select(torch.zeros(2))
    calls._select(torch.zeros(3))
    assert calls.seen == ["cpu", "reference"]


def test_a_forced_backend_serves_or_raises(calls):
    with flexkernels.backend("reference"):
        calls._select(torch.zeros(2))
    with flexkernels.backend("cpu"):
        calls._select(torch.zeros(2))
        with pytest.raises(RuntimeError, match=r"probe: the forced backend 'cpu' cannot serve .*odd length"):
            calls._select(torch.zeros(3))
    with flexkernels.backend("triton"), pytest.raises(RuntimeError, match="it has no probe"):
        calls._select(torch.zeros(2))
    assert calls.seen == ["reference", "cpu"]


def test_an_unavailable_backend_gives_its_reason(calls, monkeypatch):
    monkeypatch.setattr(library._native, "cpu_unavailable", "the compiler was away")
    calls._select(torch.zeros(2))
    assert calls.seen == ["reference"]
    with flexkernels.backend("cpu"), pytest.raises(RuntimeError, match="the compiler was away"):
        calls._select(torch.zeros(2))


def test_other_devices_get_the_reference(calls):
    calls._select(torch.zeros(2, device="meta"))
    assert calls.seen == ["reference"]
    with flexkernels.backend("cpu"), pytest.raises(RuntimeError, match="does not run on meta tensors"):
        calls._select(torch.zeros(2, device="meta"))


def test_no_row_at_all_raises(calls, monkeypatch):
    del calls.backends["reference"]
    with pytest.raises(RuntimeError, match=r"no backend can serve .*cpu: odd length; reference: it has no probe"):
        calls._select(torch.zeros(3))


def test_environment_is_read_at_import():
    program = "import flexkernels; print(flexkernels.library.current_backend())"
    environment = dict(os.environ, FLEXKERNELS_BACKEND="reference")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "reference"


def test_context_nests_and_ends_after_an_error():
    with flexkernels.backend("reference"):
        with pytest.raises(KeyError), flexkernels.backend("cpu"):
            assert library.current_backend() == "cpu"
            raise KeyError
        assert library.current_backend() == "reference"
    assert library.current_backend() == "auto"


def test_context_holds_in_every_thread():
    seen = []
    with flexkernels.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(library.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_names_are_refused():
    with (
        pytest.raises(ValueError, match=r"backend must be one of auto, reference, .*got 'fast'"),
        flexkernels.backend("fast"),
    ):
        pass


def test_triton_needs_its_interpreter_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with flexkernels.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        flexkernels.fsq_quantize(torch.zeros(2, 1), [2])


def test_cuda_does_not_take_cpu_tensors():
    with flexkernels.backend("cuda"), pytest.raises(RuntimeError, match="forced backend 'cuda' cannot serve"):
        flexkernels.fsq_quantize(torch.zeros(2, 1), [2])


@needs_gpu
def test_cpu_does_not_take_gpu_tensors():
    with flexkernels.backend("cpu"), pytest.raises(RuntimeError, match="forced backend 'cpu' cannot serve"):
        flexkernels.fsq_quantize(torch.zeros(2, 1, device="cuda"), [2])


def test_import_leaves_triton_alone():
    program = "import sys, flexkernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
