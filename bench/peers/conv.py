"""What PyTorch has for a causal convolution over channels-last video."""

import torch.nn.functional as F


def causal(x, weight):
    """conv3d behind a padding of zeros.

    Source: PyTorch (torch.nn.functional.conv3d).
    """
    time, high, wide = weight.shape[2:]
    x = F.pad(x, (0, 0, 0, 0, 0, 0, time - 1, 0)).permute(0, 4, 1, 2, 3)
    return F.conv3d(x, weight, padding=(0, high // 2, wide // 2)).permute(0, 2, 3, 4, 1)


def norm_silu(x, weight, bias):
    """Two calls.

    Source: PyTorch (torch.nn.functional.layer_norm, silu).
    """
    return F.silu(F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6))
