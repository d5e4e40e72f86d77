import torch

from flexkernels.triton import fsq

from .record import Recorder

KERNELS = {"fsq_quantize_kernel", "fsq_dequantize_kernel"}


def launches():
    found = []
    quantize, dequantize = fsq.fsq_quantize_kernel, fsq.fsq_dequantize_kernel
    fsq.fsq_quantize_kernel, fsq.fsq_dequantize_kernel = Recorder(quantize, found), Recorder(dequantize, found)
    cases = (
        ((8, 8, 8, 5, 5, 5), torch.float32, torch.int64, False),
        ((7,) * 16, torch.bfloat16, torch.int64, False),
        ((256, 3), torch.float16, torch.int32, False),
        ((8, 8, 8, 5, 5, 5), torch.bfloat16, torch.uint16, False),
        ((8, 5, 3), torch.float32, torch.int64, True),
    )
    for levels, dtype, ids_dtype, symmetric in cases:
        thresholds = torch.zeros(len(levels), max(levels) - 1)
        table = torch.zeros(len(levels), max(levels)) if symmetric else None
        z, ids = torch.zeros(32, len(levels), dtype=dtype), torch.zeros(32, dtype=ids_dtype)
        fsq.fsq_quantize_triton(z, thresholds, levels, z, ids, table)
        fsq.fsq_dequantize_triton(ids, levels, z, table)
    return found
