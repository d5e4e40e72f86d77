import torch

from flexkernels.triton import norm, norm_silu

from .record import Recorder

LAYER, RMS = False, True

KERNELS = {
    "norm_forward_kernel",
    "norm_backward_kernel",
    "norm_sums_kernel",
    "norm_merge_kernel",
    "swiglu_kernel",
    "swiglu_backward_kernel",
    "norm_silu_kernel",
}


def launches():
    found = []
    for name in KERNELS:
        module = norm_silu if name == "norm_silu_kernel" else norm
        setattr(module, name, Recorder(getattr(module, name), found))
    segment, order = torch.zeros(4, dtype=torch.int32), torch.arange(4)
    for d, dtype, table_dtype in ((8192, torch.float32, torch.float32), (1792, torch.bfloat16, torch.float32)):
        x, table = torch.zeros(4, d, dtype=dtype), torch.zeros(2, 6 * d, dtype=table_dtype)[:, :d]
        stats, grad, offsets = torch.zeros(4, 2), torch.zeros(2, d), torch.tensor([0, 4, 4])
        norm.launch_forward(x, x, table, table, table, segment, 1e-5, LAYER, x, x)
        norm.launch_backward(x, x, x, table, table, segment, 1e-5, LAYER, x, x, stats)
        norm.launch_sums(x, x, x, x, stats, segment, order, offsets, grad, grad, grad)
        norm.launch_swiglu(x, x[:, : d // 2].contiguous())
        norm.launch_swiglu_backward(x[:, : d // 2].contiguous(), x, x)
    # a wide row of an RMS norm with its residual; a gated residual by itself; an odd width
    x, weight = torch.zeros(4, 384, dtype=torch.float16), torch.zeros(1, 384)
    norm.launch_forward(x, x, None, None, weight, None, 1e-6, RMS, x, x)
    norm.launch_backward(x, None, x, None, weight, None, 1e-6, RMS, x, None, torch.zeros(4, 2))
    norm.launch_sums(x, x, x, None, torch.zeros(4, 2), None, None, None, None, None, weight)
    x, table = torch.zeros(4, 17), torch.zeros(2, 17)
    norm.launch_forward(x, x, table, None, None, segment, 0.0, LAYER, x, None)
    norm.launch_backward(None, x, None, table, None, segment, 0.0, LAYER, None, x, None)
    # VidTok's widths, an odd one, and the widest
    for d, dtype in ((128, torch.bfloat16), (512, torch.float16), (17, torch.float32), (8192, torch.float32)):
        x, weight = torch.zeros(4, d, dtype=dtype), torch.zeros(d)
        norm_silu.launch(x, weight, weight, 1e-6, x)
    return found
