"""Prints, as JSON, what Triton would compile attention anew for: by kernel, the lengths of batches under each key.

Run by test_triton_compile.py in a process of its own, since kernels imported under TRITON_INTERPRET=1 have no keys.
"""

import json

import gates.attention
import torch
from gates.record import Recorder
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import flexkernels
from flexkernels import SequenceLayout
from flexkernels.triton import attention, attention_backward

# counts of 1, multiples of 16 and not, shorter and longer than any tile, several sequences, and none
BATCHES = ([1], [16], [17], [64, 64], [100, 3, 5000], [4096], [])
# head_dim, and rows of a tile: through pointers, and at 128 by TMA descriptors
TILES = (64, 64), (128, 128)
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


def key(kernel, args, kwargs) -> str:
    """What a launch looks its binary up with: types, constants, alignments and options."""
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialization, options = bind(*args, **kwargs)
    return json.dumps([str(specialization), str(options)])


def launched(lengths: list[int], mask: str, head_dim: int) -> list:
    layout, found = SequenceLayout([[(n // 2, n - n // 2)] for n in lengths], mask), []
    for module in (attention, attention_backward):
        for name in gates.attention.KERNELS & set(vars(module)):
            setattr(module, name, Recorder(getattr(module, name), found))
    q, lse, weight = (
        torch.zeros(layout.total, 2, head_dim).bfloat16(),
        torch.zeros(2, layout.total),
        torch.zeros(layout.total),
    )
    given = layout.arguments[0], weight, *layout.arguments[1:], None
    attention.launch(q, q, q, *given, q, lse)
    attention_backward.launch(q, q, q, q, q, lse, *given, q, q, q)
    for module in (attention, attention_backward):
        for name in gates.attention.KERNELS & set(vars(module)):
            setattr(module, name, getattr(module, name).kernel)
    return found


if __name__ == "__main__":
    keys = {}
    for head_dim, rows in TILES:
        flexkernels.layout.tile_rows = lambda *_, rows=rows: rows
        for mask in ("full", "frame_causal_prefix"):
            for lengths in BATCHES:
                for kernel, args, kwargs in launched(lengths, mask, head_dim):
                    batches = keys.setdefault(f"{kernel.__name__} {head_dim}", {})
                    batches.setdefault(key(kernel, args, kwargs), []).append([mask, *lengths])
    print(json.dumps({name: list(found.values()) for name, found in keys.items()}))
