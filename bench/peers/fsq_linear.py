"""FSQ between its linear layers, by PyTorch's own ops."""

import torch.nn.functional as F


def project_quantize(formula, hidden, weight, bias):
    """LN without parameters, linear, FSQ: hidden [n, width] -> ids [n].

    Source: the encoder's head of arXiv 2604.12887, by torch.nn.functional.
    """
    return formula.quantize(F.linear(F.layer_norm(hidden, hidden.shape[1:]), weight, bias))[1]


def embed(formula, ids, weight, bias, positions, position_index):
    """Source: the decoder's register embedding of arXiv 2604.12887, by torch.nn.functional."""
    return F.linear(formula.dequantize(ids), weight, bias) + positions[position_index]
