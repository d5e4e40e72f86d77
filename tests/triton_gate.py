"""Compiles every Triton kernel of the package, exactly as it is launched, for GPUs that need not be present.

    python tests/triton_gate.py cuda-90 hip-gfx942

prints JSON, for each target a list of: name, shared (bytes), spills (bytes or registers; null without an assembler).

Run by test_triton_compile.py in a process of its own, since kernels imported under TRITON_INTERPRET=1 cannot compile.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexkernels import flow_math
from flexkernels.triton import flow, fsq

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def fsq_launches():
    launches = []
    quantize, dequantize = fsq.fsq_quantize_kernel, fsq.fsq_dequantize_kernel
    fsq.fsq_quantize_kernel, fsq.fsq_dequantize_kernel = Recorder(quantize, launches), Recorder(dequantize, launches)
    cases = (
        ((8, 8, 8, 5, 5, 5), torch.float32, torch.int64),
        ((7,) * 16, torch.bfloat16, torch.int64),
        ((256, 3), torch.float16, torch.int32),
    )
    for levels, dtype, ids_dtype in cases:
        thresholds = torch.zeros(len(levels), max(levels) - 1)
        z, ids = torch.zeros(32, len(levels), dtype=dtype), torch.zeros(32, dtype=ids_dtype)
        fsq.fsq_quantize_triton(z, thresholds, levels, z, ids)
        fsq.fsq_dequantize_triton(ids, levels, z)
    return launches


def flow_launches():
    launches = []
    flow.flow_step_kernel = Recorder(flow.flow_step_kernel, launches)
    offsets = torch.zeros(3, dtype=torch.int64)
    for kind in (flow_math.NO_GUIDANCE, flow_math.GUIDANCE_CFG, flow_math.GUIDANCE_APG):
        apg = kind == flow_math.GUIDANCE_APG
        for x, everything in ((torch.zeros(64), False), (torch.zeros(64, dtype=torch.bfloat16), True)):
            wide, last = torch.zeros(64), torch.zeros(64) if apg and everything else None
            tensors = flow_math.Tensors(x, x, x if kind else None, last, None, None, None, None)
            if everything:
                tensors = tensors._replace(row_offsets=offsets, prefix=wide, prefix_offsets=offsets, prefix_noise=wide)
            momentum = -0.5 if last is not None else 0.0
            numbers = flow_math.Numbers(-0.1, kind, 3.0, 0.6, 0.0, momentum, 0.5)
            flow.flow_step_triton(tensors, 2, numbers, x, last)
    return launches


def source(kernel, args, kwargs):
    """What Triton would compile for this launch: types, constants and the alignment it finds."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
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


def spills(compiled, target: GPUTarget):
    if target.backend == "hip":
        return sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    text = compiled.asm["ptx"]
    architecture = re.search(r"\.target (\w+)", text).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        report = assemble(path, architecture)
    return None if report is None else sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def parse(name: str) -> GPUTarget:
    backend, architecture = name.split("-")
    return GPUTarget(backend, architecture, 64) if backend == "hip" else GPUTarget(backend, int(architecture), 32)


def gate(target: GPUTarget, launches):
    for kernel, args, kwargs in launches:
        program, options = source(kernel, args, kwargs)
        compiled = triton.compile(program, target=target, options=options)
        yield {"name": kernel.__name__, "shared": compiled.metadata.shared, "spills": spills(compiled, target)}


if __name__ == "__main__":
    launches = fsq_launches() + flow_launches()
    print(json.dumps({name: list(gate(parse(name), launches)) for name in sys.argv[1:]}))
