import torch

from flexkernels.triton import fsq

from .record import Recorder

KERNELS = {"fsq_quantize_kernel", "fsq_dequantize_kernel"}


def launches():
    found = []
    for name in KERNELS:
        setattr(fsq, name, Recorder(getattr(fsq, name), found))
    cases = (
        (32, (8, 8, 8, 5, 5, 5), torch.float32, torch.int64, False),
        (32, (7,) * 16, torch.bfloat16, torch.int64, False),
        (32, (256, 3), torch.float16, torch.int32, False),
        (32, (8, 8, 8, 5, 5, 5), torch.bfloat16, torch.uint16, False),
        (32, (8, 5, 3), torch.float32, torch.int64, True),
        # every integer argument 1, which makes it a constant
        (1, (2,), torch.float32, torch.int64, False),
        (1, (2,), torch.bfloat16, torch.uint16, True),
    )
    for rows, levels, dtype, ids_dtype, symmetric in cases:
        z, ids = torch.zeros(rows, len(levels), dtype=dtype), torch.zeros(rows, dtype=ids_dtype)
        fsq.fsq_quantize_triton(z, levels, True, True, ids_dtype, symmetric, False)
        fsq.fsq_dequantize_triton(ids, levels, dtype, symmetric)
    return found
