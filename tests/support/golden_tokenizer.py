"""Small random tokenizers of the published implementation, and what it computes with them."""

import json
from functools import cache

from paths import TOKENIZERS
from safetensors.torch import load_file

import vft
from vft import checkpoint
from vft.config import parse_config

CASES = ("base", "flexmask", "fulldec", "early_drop")
# how far above the published float32-vs-float64 error our float32 results may lie
MARGIN = 5
KEEP = (4, 11)
PIPELINES = list(json.loads((TOKENIZERS / "base" / "io.json").read_text())["pipelines"])


@cache
def load(case):
    config = parse_config(json.loads((TOKENIZERS / case / "config.json").read_text()))
    model = vft.Tokenizer(config, case)
    checkpoint.load_weights(model, config, load_file(TOKENIZERS / "weights.safetensors"))
    io, facts = load_file(TOKENIZERS / case / "io.safetensors"), json.loads((TOKENIZERS / case / "io.json").read_text())
    return model.eval().requires_grad_(False), io, facts


def assert_close(case, name, got):
    _, io, facts = load(case)
    want = io[name].squeeze(0).double()
    error = float((got.double() - want).norm() / want.norm())
    limit = MARGIN * facts["float32_vs_float64"][name]["rel_l2"]
    assert error <= limit, f"{case} {name}: relative error {error:.2e}, at most {limit:.2e}"


def samples(io, name):
    return [io[f"{name}_{i}"].squeeze(0) for i in (0, 1)]
