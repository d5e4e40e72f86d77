"""A tokenizer of random weights for whole videos."""

import torch

import vft
from vft.config import make_config, parse_config


def small(size=32):
    torch.manual_seed(0)
    config = make_config(
        encoder_width=64, encoder_depth=1, decoder_width=64, decoder_depth=1, registers=4, grid=16, codec="linear",
        size=size,
    )  # fmt: skip
    return vft.Tokenizer(parse_config(config), "small").eval().requires_grad_(False)
