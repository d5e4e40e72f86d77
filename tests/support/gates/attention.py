import torch

from flexkernels.triton import attention

from .record import Recorder

KERNELS = {"attention_kernel", "attention_dq_kernel", "attention_dkdv_kernel"}
CAUSAL, PREFIX = (1, (1, 1, 1, 1)), (3, (1, 0, 0, 2))
# dtype, head_dim, mask and cross, weights, query heads a kv head
FORWARD = (
    (torch.bfloat16, 64, PREFIX, True, 1),
    (torch.float16, 128, CAUSAL, False, 4),
    (torch.bfloat16, 256, PREFIX, False, 1),
    (torch.float32, 64, PREFIX, True, 1),
    (torch.float32, 17, CAUSAL, False, 1),
)
BACKWARD = (
    (torch.bfloat16, 64, PREFIX, True, 1),
    (torch.float16, 256, CAUSAL, False, 4),
    (torch.float32, 64, PREFIX, False, 1),
)


def launch(dtype, head_dim, mask, weighted, group, backward):
    q, k = torch.zeros(32, 4, head_dim, dtype=dtype), torch.zeros(32, 4 // group, head_dim, dtype=dtype)
    lse, index, weight = torch.zeros(32, 4), torch.zeros(32, dtype=torch.int32), torch.zeros(32) if weighted else None
    plan = (torch.zeros(1, 4, dtype=torch.int32), index, index)
    common = (index, index, index, index, index, index, *plan)
    if backward:
        attention.attention_backward_triton(q, q, k, k, q, lse, *common, *plan, weight, *mask, 0.125, q, k, k, rows=128)
    else:
        attention.attention_triton(q, k, k, *common, weight, *mask, 0.125, q, lse, rows=128)


def launches():
    found = []
    for name in KERNELS:
        setattr(attention, name, Recorder(getattr(attention, name), found))
    for case in FORWARD:
        launch(*case, backward=False)
    for case in BACKWARD:
        launch(*case, backward=True)
    return found
