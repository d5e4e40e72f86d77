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
    """An op `probe` with rows for the CPU that only note their name; its `cpu` row refuses odd lengths."""
    seen = []
    monkeypatch.setattr(library, "_table", {})
    monkeypatch.setattr(library._native, "cpu_unavailable", None)
    for name in ("cpu", "reference"):
        refuse = (lambda x: "odd length" if len(x) % 2 else None) if name == "cpu" else None
        library.register("probe", name, lambda x, name=name: seen.append(name), refuse)
    return seen


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
    library.launch("probe", torch.zeros(2))
    library.launch("probe", torch.zeros(3))
    assert calls == ["cpu", "reference"]


def test_a_forced_backend_serves_or_raises(calls):
    with flexkernels.backend("reference"):
        library.launch("probe", torch.zeros(2))
    with flexkernels.backend("cpu"):
        library.launch("probe", torch.zeros(2))
        with pytest.raises(RuntimeError, match=r"probe: the forced backend 'cpu' cannot serve .*odd length"):
            library.launch("probe", torch.zeros(3))
    with flexkernels.backend("triton"), pytest.raises(RuntimeError, match="it has no probe"):
        library.launch("probe", torch.zeros(2))
    assert calls == ["reference", "cpu"]


def test_an_unavailable_backend_gives_its_reason(calls, monkeypatch):
    monkeypatch.setattr(library._native, "cpu_unavailable", "the compiler was away")
    library.launch("probe", torch.zeros(2))
    assert calls == ["reference"]
    with flexkernels.backend("cpu"), pytest.raises(RuntimeError, match="the compiler was away"):
        library.launch("probe", torch.zeros(2))


def test_other_devices_get_the_reference(calls):
    library.launch("probe", torch.zeros(2, device="meta"))
    assert calls == ["reference"]
    with flexkernels.backend("cpu"), pytest.raises(RuntimeError, match="does not run on meta tensors"):
        library.launch("probe", torch.zeros(2, device="meta"))


def test_no_row_at_all_raises(calls, monkeypatch):
    monkeypatch.delitem(library._table["probe"], "reference")
    with pytest.raises(RuntimeError, match=r"no backend can serve .*cpu: odd length; reference: it has no probe"):
        library.launch("probe", torch.zeros(3))


def test_environment_forces_and_context_wins(calls, monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT, "reference")
    library.launch("probe", torch.zeros(2))
    with flexkernels.backend("auto"):
        library.launch("probe", torch.zeros(2))
    assert calls == ["reference", "cpu"]


def test_context_nests_and_ends_after_an_error():
    with flexkernels.backend("reference"):
        with pytest.raises(KeyError), flexkernels.backend("cpu"):
            assert library.current_backend() == "cpu"
            raise KeyError
        assert library.current_backend() == "reference"
    assert library.current_backend() == "auto"


def test_context_stays_in_its_thread():
    seen = []
    with flexkernels.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(library.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_names_are_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"backend must be one of auto, reference, .*got 'fast'"),
        flexkernels.backend("fast"),
    ):
        pass
    with pytest.raises(ValueError, match=r"backend must be one of reference, .*got 'fast'"):
        library.register("probe", "fast", print)
    monkeypatch.setenv(library.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        flexkernels.fsq_quantize(torch.zeros(2, 1), [2])


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
