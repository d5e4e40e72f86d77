import torch

from flexkernels.triton import sampling

from .record import Recorder

KERNELS = {"sample_logits_kernel"}


def launches():
    found = []
    sampling.sample_logits_kernel = Recorder(sampling.sample_logits_kernel, found)
    ids, wide = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for dtype, vocab, everything in (
        (torch.float32, 64000, False),
        (torch.bfloat16, 64000, True),
        (torch.half, 50, True),
    ):
        logits = torch.zeros(2, vocab, dtype=dtype)
        uncond, per_row, logprob = (logits, ids, wide) if everything else (None, None, None)
        filters = (20, 2**29, -3.0) if everything else (vocab, 0, -float("inf"))
        for scale in (0.0, 1.5):
            sampling.sample_logits_triton(
                logits, uncond, 1.5, scale, *filters, 2**40, per_row, 2**40, per_row, ids, logprob
            )
    return found
