import torch

from flexkernels.triton import linear

from .record import Recorder

KERNELS = {"skinny_linear_kernel"}


def launches():
    found = []
    linear.skinny_linear_kernel = Recorder(linear.skinny_linear_kernel, found)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, wide = torch.zeros(2, 640, dtype=dtype), torch.zeros(64)
        float_weight, int8_weight = torch.zeros(64, 640, dtype=dtype), torch.zeros(64, 640, dtype=torch.int8)
        linear.skinny_linear_triton(x, float_weight, None, None, None, False)
        linear.skinny_linear_triton(x, int8_weight, wide, x[0, :64], x[:, :32], True)
    # every size 1, which Triton makes constants
    one = torch.zeros(1, 1)
    linear.skinny_linear_triton(one, torch.zeros(2, 1), None, torch.zeros(2), one, True)
    return found
