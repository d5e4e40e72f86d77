"""Compiles every Triton kernel of the package, exactly as it is launched, for GPUs that need not be present.

    python tests/support/triton_gate.py cuda-90 hip-gfx942

prints JSON: the kernels' names, and for each target a list of: name, shared (bytes), registers of a thread and spills
(bytes or registers); both are null without an assembler.

Run by test_triton_compile.py in a process of its own, since kernels imported under TRITON_INTERPRET=1 cannot compile.
"""

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gates
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint16: "*u16",
    torch.int8: "*i8",
}


def source(kernel, args, kwargs):
    """What Triton would compile for this launch: types, constants and the alignment it finds."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in values}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, path = values[parameter.name], (index,)
        aligned = [["tt.divisibility", 16]]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[path] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[path] = POINTERS[value.dtype], aligned
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[path] = aligned
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def assemblers() -> list[str]:
    """The assemblers that Triton brings along and the one on the path; they know different versions of PTX."""
    bundled = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    return [str(path) for path in bundled] + [path for path in [shutil.which("ptxas")] if path]


def assemble(path: Path, architecture: str) -> str | None:
    """What the first assembler that accepts the file says of it; None where there is no assembler at all."""
    result = None
    for program in assemblers():
        command = [program, "-v", "--gpu-name", architecture, str(path), "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stderr
    if result is not None:
        raise RuntimeError(result.stderr)
    return None


def usage(compiled, target: GPUTarget) -> dict:
    """Registers of a thread, and what spills."""
    if target.backend == "hip":
        count = lambda pattern: sum(int(n) for n in re.findall(pattern, compiled.asm["amdgcn"]))  # noqa: E731
        return {"registers": count(r"\.vgpr_count:\s*(\d+)"), "spills": count(r"\.[sv]gpr_spill_count:\s*(\d+)")}
    text = compiled.asm["ptx"]
    architecture = re.search(r"\.target (\w+)", text).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        report = assemble(path, architecture)
    if report is None:
        return {"registers": None, "spills": None}
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return {"registers": int(re.search(r"Used (\d+) registers", report).group(1)), "spills": spills}


def parse(name: str) -> GPUTarget:
    backend, architecture = name.split("-")
    return GPUTarget(backend, architecture, 64) if backend == "hip" else GPUTarget(backend, int(architecture), 32)


def gate(target: GPUTarget, launches):
    for kernel, args, kwargs in launches:
        program, options = source(kernel, args, kwargs)
        compiled = triton.compile(program, target=target, options=options)
        yield {"name": kernel.__name__, "shared": compiled.metadata.shared, **usage(compiled, target)}


if __name__ == "__main__":
    families = [importlib.import_module(f"gates.{m.name}") for m in pkgutil.iter_modules(gates.__path__)]
    families = [family for family in families if hasattr(family, "launches")]
    launches = [launch for family in families for launch in family.launches()]
    report = {name: list(gate(parse(name), launches)) for name in sys.argv[1:]}
    print(json.dumps(report | {"kernels": sorted(set().union(*(family.KERNELS for family in families)))}))
