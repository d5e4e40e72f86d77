import torch

from flexkernels.triton import fsq_linear

from .record import Recorder

KERNELS = {"fsq_project_kernel", "fsq_embed_kernel"}


def launches():
    found = []
    for name in KERNELS:
        setattr(fsq_linear, name, Recorder(getattr(fsq_linear, name), found))
    cases = (
        (32, 1152, (8, 8, 8, 5, 5, 5), torch.float32, torch.int64),
        (32, 1152, (8, 8, 8, 5, 5, 5), torch.bfloat16, torch.int32),
        (32, 1152, (8, 8, 8, 5, 5, 5), torch.float16, torch.uint16),
        # every integer argument 1, which makes it a constant
        (1, 1, (2,), torch.float32, torch.int64),
    )
    for rows, width, levels, dtype, ids_dtype in cases:
        hidden, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(len(levels), width, dtype=dtype)
        ids, index = torch.zeros(rows, dtype=ids_dtype), torch.zeros(rows, dtype=torch.int32)
        bias = torch.zeros(len(levels), dtype=dtype)
        for codes in (True, False):
            fsq_linear.fsq_project_quantize_triton(hidden, weight, bias, levels, 1e-5, codes, ids_dtype)
        fsq_linear.fsq_embed_triton(ids, levels, weight.t(), hidden[0], hidden, index, hidden, index)
        fsq_linear.fsq_embed_triton(ids, levels, weight.t(), None, None, None, None, None)
    return found
