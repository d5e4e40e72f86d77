"""setup.py: what it finds, what it refuses, and the installs that need no compiler. Nothing is compiled here."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import flexkernels
from flexkernels import _native, info, version


@pytest.fixture(scope="module")
def setup_script():
    spec = importlib.util.spec_from_file_location("flexkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, *arguments, **environment):
    command = [sys.executable, "setup.py", "build", "--build-base", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def native_objects(folder):
    return sorted(path.name for path in folder.rglob("*.so"))


def run_from(folder, program):
    (library,) = folder.glob("lib*")
    environment = dict(os.environ, PYTHONPATH=str(library))
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)


def test_build_off_is_pure_python_and_works(tmp_path):
    done = build(tmp_path, FLEXKERNELS_BUILD="off")
    assert done.returncode == 0, done.stderr
    assert native_objects(tmp_path) == []
    program = (
        "import torch, flexkernels; from flexkernels import _native\n"
        "print(flexkernels.__file__, _native.cpu_unavailable)\n"
        "print(flexkernels.fsq_quantize(torch.zeros(2, 1), [3])[1].tolist())"
    )
    ran = run_from(tmp_path, program)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path) in ran.stdout and "not built" in ran.stdout and "[1, 1]" in ran.stdout


def test_no_compiler_is_a_warning(tmp_path):
    done = build(tmp_path / "build", FLEXKERNELS_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "C++ compiler not found" in done.stdout + done.stderr
    assert native_objects(tmp_path) == []


def test_no_compiler_is_an_error_when_native_was_asked_for(tmp_path):
    done = build(tmp_path / "build", FLEXKERNELS_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0 and "FLEXKERNELS_BUILD=cpu needs a C++ compiler" in done.stderr


def test_a_failing_compiler_fails_the_build(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = build(tmp_path / "build", FLEXKERNELS_BUILD="cpu", CXX=str(broken))
    assert done.returncode != 0 and "the native build of flexkernels failed" in done.stderr


def test_unknown_mode(tmp_path):
    done = build(tmp_path, FLEXKERNELS_BUILD="fast")
    assert done.returncode != 0
    assert "FLEXKERNELS_BUILD must be one of auto, cpu, cuda, off, got 'fast'" in done.stderr


def fake_torch(folder, torch_version):
    (folder / "torch" / "lib").mkdir(parents=True)
    (folder / "torch" / "lib" / "libtorch_cpu.so").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{torch_version}'\n")
    return folder


def hide_torch(setup_script, monkeypatch, *folders):
    monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_script, "site_folders", lambda: iter(folders))


def test_no_torch_says_what_to_run(setup_script, monkeypatch, tmp_path):
    hide_torch(setup_script, monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        setup_script.require_torch()
    assert "pip install 'torch>=2.10'" in str(stopped.value) and "\n" not in str(stopped.value)


def test_old_torch_is_refused(setup_script, monkeypatch, tmp_path):
    hide_torch(setup_script, monkeypatch, fake_torch(tmp_path, "2.9.1+cu128"))
    with pytest.raises(SystemExit, match=r"needs torch 2.10 or newer, found 2.9.1\+cu128"):
        setup_script.require_torch()


def test_torch_is_found_where_isolation_hides_it(setup_script, monkeypatch, tmp_path):
    hide_torch(setup_script, monkeypatch, tmp_path / "empty", fake_torch(tmp_path, "2.13.0"))
    assert setup_script.require_torch() == tmp_path / "torch"


def test_site_folders_hold_this_torch(setup_script):
    import torch

    assert Path(torch.__file__).parents[1] in [Path(folder) for folder in setup_script.site_folders()]


@pytest.fixture
def nvcc(tmp_path):
    """A stand-in that knows the codes listed in its companion file."""
    script, codes = tmp_path / "nvcc", tmp_path / "codes"
    script.write_text(f"#!/bin/sh\ncat {codes}\n")
    script.chmod(0o755)
    return lambda *known: codes.write_text("\n".join(known)) and str(script)


def test_default_archs_ask_nvcc(setup_script, monkeypatch, nvcc):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    modern = nvcc("sm_75", "sm_80", "sm_90", "sm_100", "sm_121")
    assert setup_script.cmake_archs(modern) == ["80-real", "90"]
    assert setup_script.cmake_archs(nvcc("sm_80", "sm_90")) == ["80-real", "90"]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        setup_script.cmake_archs(nvcc("sm_52"))


def test_arch_list_is_honoured(setup_script, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    assert setup_script.cmake_archs("unused") == ["86-real", "90a-real", "120-real", "120-virtual"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="got 'Hopper'"):
        setup_script.cmake_archs("unused")


@pytest.mark.skipif(_native.C is None, reason=f"no native kernels: {_native.cpu_unavailable}")
def test_the_native_module_is_one_for_every_python():
    folder = Path(_native.C.__file__).parent
    assert [path.name for path in folder.glob("_C.*.so")] == ["_C.abi3.so"]
    checker = pytest.importorskip("kernel_abi_check")
    assert checker.ObjectFile(_native.C.__file__).check_python_abi("3.10") == []


def test_source_list_is_complete(setup_script):
    folder = ROOT / "csrc"
    found = {str(path.relative_to(folder)) for pattern in ("*.cpp", "*.cu") for path in folder.rglob(pattern)}
    assert sorted(setup_script.SOURCES) == sorted(found)


def test_kernel_units_include_no_templates_of_the_standard_library():
    """An inline function compiled for AVX-512 could become the program's only copy; torch headers cost every unit."""
    allowed = {"stdint.h", "string.h", "math.h", "immintrin.h", "cuda_bf16.h", "cuda_fp16.h"}
    folders = [ROOT / "csrc" / "cpu", ROOT / "csrc" / "core"]
    files = [path for folder in folders for path in folder.iterdir() if path.name != "plan.h"]
    assert len(files) >= 6
    for path in files:
        assert set(re.findall(r"#include <([^>]+)>", path.read_text())) <= allowed, path


def test_one_version():
    assert flexkernels.__version__ == version.__version__
    if _native.C is not None:
        assert _native.C.build_info()["version"] == version.__version__


def test_info_is_plain_data(capsys):
    import json

    info.main(["--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["versions"]["flexkernels"] == version.__version__
    assert set(shown["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert (shown["build"] is None) == (_native.C is None)
    info.main([])
    text = capsys.readouterr().out
    assert all(f"backend {name}" in text for name in shown["backends"])
