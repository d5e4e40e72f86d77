import torch

from flexkernels.triton import fsq_linear

from .record import Recorder

KERNELS = {"fsq_project_kernel", "fsq_embed_kernel"}


def launches():
    found = []
    for name in KERNELS:
        setattr(fsq_linear, name, Recorder(getattr(fsq_linear, name), found))
    levels, index = (8, 8, 8, 5, 5, 5), torch.zeros(32, dtype=torch.int32)
    weight, row, thresholds = torch.zeros(6, 1152), torch.zeros(1152), torch.zeros(6, 7)
    table = torch.zeros(2, 6, dtype=torch.int64)
    for dtype, ids_dtype in (
        (torch.float32, torch.int64),
        (torch.bfloat16, torch.int32),
        (torch.float16, torch.uint16),
    ):
        hidden, ids = torch.zeros(32, 1152, dtype=dtype), torch.zeros(32, dtype=ids_dtype)
        codes = torch.zeros(32, 6, dtype=dtype)
        fsq_linear.fsq_project_quantize_triton(hidden, weight, row[:6], thresholds, table, 1e-5, codes, ids)
        fsq_linear.fsq_embed_triton(ids, levels, weight, row, hidden, index, hidden, index, hidden)
    fsq_linear.fsq_embed_triton(ids, levels, weight, None, None, None, None, None, hidden)
    return found
