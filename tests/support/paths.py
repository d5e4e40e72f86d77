"""Where the tests find what is not installed: the repository, and the published models' inputs and outputs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = ROOT / "tests" / "data" / "tokenizer"
GENERATORS = ROOT / "tests" / "data" / "generator"
# registers and shared memory of the Triton kernels, by target: tests/support/triton_gate.py writes it
REGISTERS = ROOT / "tests" / "data" / "registers.json"
# the same of the CUDA kernels: tests/support/cuda_gate.py writes it
CUDA_REGISTERS = ROOT / "tests" / "data" / "cuda_registers.json"
# parts of clips of vft.train.procedural and vft.train.named, as they were when the embedded models were trained
PROCEDURAL = ROOT / "tests" / "data" / "procedural.safetensors"
