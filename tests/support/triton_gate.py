"""Compiles every Triton kernel of the package, exactly as it is launched, for GPUs that need not be present.

    python tests/support/triton_gate.py cuda-90 hip-gfx942 [--write]

prints JSON: the version of Triton, the kernels' names, and under each target

    compiled    a launch each: kernel, label, registers and shared memory, what spills, what the assembler warns of
    ones        what failed where one integer argument was 1, which Triton makes a constant of

--write puts registers and shared memory into tests/data/registers.json, which test_triton_compile.py compares with.

Run by that test in a process of its own, since kernels imported under TRITON_INTERPRET=1 cannot compile.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re

# the assembler's report is printed by Triton, and never left out because the kernel is in a cache
os.environ |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}

import gates
import torch
import triton
from paths import REGISTERS
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from flexkernels.triton.attention import AMD_STAGES

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint16: "*u16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "num_ctas")


class Launch:
    """A kernel with the arguments by name that it was launched with, and the compiler's options."""

    def __init__(self, kernel, args, kwargs):
        self.kernel = kernel
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        self.options = {name: values.pop(name) for name in OPTIONS if name in values}
        # parameters left out have defaults
        self.values = {p.name: values.get(p.name, p.default) for p in kernel.params}

    def source(self, ones=()) -> ASTSource:
        """What Triton would compile for this launch: types, constants and the alignment it finds.

        ones: names of integer arguments that are 1 instead.
        """
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value, path = 1 if parameter.name in ones else self.values[parameter.name], (index,)
            aligned = [["tt.divisibility", 16]]
            plain = isinstance(value, int) and not isinstance(value, bool)
            if parameter.is_constexpr or value is None or (plain and value == 1 and not parameter.do_not_specialize):
                signature[parameter.name], constants[path] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[path] = POINTERS[value.dtype], aligned
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
            elif isinstance(value, bool):
                signature[parameter.name] = "u1"
            elif plain:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[path] = aligned
            else:
                signature[parameter.name] = "fp32"
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)

    def integers(self) -> list[str]:
        """Arguments that Triton makes constants of where they happen to be 1, and are not 1 here."""
        plain = {name for name, value in self.values.items() if type(value) is int and value != 1}
        return [p.name for p in self.kernel.params if p.name in plain and not (p.is_constexpr or p.do_not_specialize)]

    def made_for(self, target: GPUTarget) -> bool:
        """Whether it would be launched like this there: tensor descriptors take a GPU that has TMA."""
        described = any(isinstance(value, TensorDescriptor) for value in self.values.values())
        return not described or (target.backend == "cuda" and target.arch >= 90)

    def label(self) -> str:
        """Kernel, dtypes of its tensors, constants and options: the same in every process."""
        dtypes = {POINTERS[v.dtype][1:]: None for v in self.values.values() if isinstance(v, torch.Tensor)}
        names = [p.name for p in self.kernel.params if p.is_constexpr]
        numbers = [f"{name}={self.values[name]}" for name in names] + [f"{k}={v}" for k, v in self.options.items()]
        missing = [name for name, value in self.values.items() if value is None]
        without = f" without {','.join(missing)}" if missing else ""
        return f"{self.kernel.__name__} {','.join(dtypes)} {' '.join(numbers)}{without}"


def compiled(launch: Launch, target: GPUTarget) -> dict:
    log, options = io.StringIO(), dict(launch.options)
    if target.backend == "hip" and launch.kernel.__name__.startswith("attention_"):
        # as flexkernels/triton/attention.py launches on AMD
        options["num_stages"] = min(options["num_stages"], AMD_STAGES)
    with contextlib.redirect_stdout(log):
        binary = triton.compile(launch.source(), target=target, options=options)
    found = {"kernel": launch.kernel.__name__, "label": launch.label(), "shared": binary.metadata.shared}
    if target.backend == "hip":
        return found | of_amd(binary.asm["amdgcn"])
    return found | of_nvidia(log.getvalue())


def of_nvidia(log: str) -> dict:
    """Registers, bytes spilled or otherwise in local memory, and warnings, from the report of ptxas."""
    registers = re.findall(r"Used (\d+) registers", log)
    if not registers:
        raise RuntimeError(f"ptxas must report registers, got {log!r}")
    local = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill \w+|lmem)", log))
    return {"registers": max(map(int, registers)), "local": local, "warnings": warnings(log)}


def warnings(log: str) -> list[str]:
    """Lines of a report of ptxas that tell of lost speed: serialized wgmma among them."""
    return [line.strip() for line in log.splitlines() if "serialized" in line or "Performance" in line]


def of_amd(code: str) -> dict:
    """Vector registers, and registers spilled and bytes of private memory together, from the kernel's metadata."""
    number = lambda name: sum(int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", code))  # noqa: E731
    local = number("private_segment_fixed_size") + number("vgpr_spill_count") + number("sgpr_spill_count")
    return {"registers": number("vgpr_count"), "local": local, "warnings": []}


def lowered(launch: Launch, target: GPUTarget, ones) -> None:
    """The first stage alone, where a constant in place of a number fails; raises what Triton raises."""
    backend, program = make_backend(target), launch.source(ones)
    options = backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementations = backend.get_codegen_implementation(options)
    program.make_ir(target, options, implementations, backend.get_module_map(), context)


def failures(launch: Launch, target: GPUTarget) -> list[str]:
    """A line an integer argument that the kernel does not compile with at 1, and one for all of them at once."""
    names = launch.integers()
    found = []
    for ones in [[name] for name in names] + [names] * (len(names) > 1):
        try:
            lowered(launch, target, ones)
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines()
            found.append(f"{launch.kernel.__name__} with {' = '.join(ones)} = 1: {reason[-1] if reason else error!r}")
    return found


def parse(name: str) -> GPUTarget:
    backend, architecture = name.split("-")
    return GPUTarget(backend, architecture, 64) if backend == "hip" else GPUTarget(backend, int(architecture), 32)


def all_launches() -> tuple[list[Launch], list[str]]:
    """Every launch of every family, and the names of all kernels."""
    families = [importlib.import_module(f"gates.{m.name}") for m in pkgutil.iter_modules(gates.__path__)]
    families = [family for family in families if hasattr(family, "launches")]
    launches = [Launch(*launch) for family in families for launch in family.launches()]
    # one of those that compile to the same
    launches = {(launch.source().hash(), *launch.options.items()): launch for launch in launches}
    return list(launches.values()), sorted(set().union(*(family.KERNELS for family in families)))


def gate(task):
    name, index = task
    launch, target = LAUNCHES[index], parse(name)
    return name, compiled(launch, target), failures(launch, target)


def write(report: dict, path) -> None:
    """[registers, shared] by target, version of Triton and label, the most where labels agree; other rows are kept."""
    table = json.loads(path.read_text()) if path.exists() else {}
    for name in report.keys() - {"triton", "kernels"}:
        rows = {}
        for found in report[name]["compiled"]:
            pair = [found["registers"], found["shared"]]
            rows[found["label"]] = [max(a, b) for a, b in zip(pair, rows.get(found["label"], pair), strict=True)]
        table.setdefault(name, {})[series(report["triton"])] = dict(sorted(rows.items()))
    text = json.dumps(table, indent=1, sort_keys=True)
    # a launch a line
    path.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")


def series(version: str) -> str:
    """Major and minor number: within them Triton allocates alike."""
    return ".".join(version.split(".")[:2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", metavar="TARGET")
    parser.add_argument("--write", action="store_true", help=f"write {REGISTERS.name}")
    parser.add_argument("--only", default="", metavar="TEXT", help="launches whose label holds this text")
    options = parser.parse_args()
    LAUNCHES, kernels = all_launches()
    LAUNCHES = [launch for launch in LAUNCHES if options.only in launch.label()]
    tasks = [
        (name, index)
        for name in options.targets
        for index, launch in enumerate(LAUNCHES)
        if launch.made_for(parse(name))
    ]
    report = {name: {"compiled": [], "ones": []} for name in options.targets}
    # forked: what was imported and recorded is there, and each process compiles on its own
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for name, found, failed in pool.imap(gate, tasks):
            report[name]["compiled"].append(found)
            report[name]["ones"] += failed
    report |= {"triton": triton.__version__, "kernels": kernels}
    if options.write:
        write(report, REGISTERS)
    print(json.dumps(report))
