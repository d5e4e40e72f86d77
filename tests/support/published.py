"""Small random models of the published tokenizer code, from a checkout that an environment variable names.

The variable holds a path, or several joined by the path separator: the checkout and where its requirements lie.
"""

import copy
import json
import os
import sys

import torch
from paths import TOKENIZERS
from torch import nn

from vft.vae import LinearCodec


def use_checkout(variable: str) -> str | None:
    """Makes the checkout importable; returns why it cannot be, or None."""
    paths = os.environ.get(variable)
    if not paths:
        return f"{variable} does not name a checkout"
    sys.path += [path for path in paths.split(os.pathsep) if path not in sys.path]
    return None


class SmallVAE(nn.Module):
    """A codec in the published interface that is fast, and deterministic: the linear one of this package."""

    images_read_key, vae_latents_read_key = "rgb", "vae_latents_reconst"
    vae_latents_write_key, images_reconst_write_key = "vae_latents", "rgb_reconst"
    temporal_downsample_factor, is_causal, downsample_factor = 4, True, 8

    def __init__(self):
        super().__init__()
        self.codec = LinearCodec.load()

    def encode(self, data_dict):
        frames = [x if x.dim() == 5 else x[:, :, None] for x in data_dict[self.images_read_key]]
        latents = [self.codec.encode(x) for x in frames]
        images = [x.dim() == 4 for x in data_dict[self.images_read_key]]
        data_dict[self.vae_latents_write_key] = [
            z[:, :, 0] if image else z for z, image in zip(latents, images, strict=True)
        ]
        return data_dict

    def decode(self, data_dict):
        latents = data_dict[self.vae_latents_read_key]
        data_dict[self.images_reconst_write_key] = [
            self.codec.decode(z) if z.dim() == 5 else self.codec.decode(z[:, :, None])[:, :, 0] for z in latents
        ]
        return data_dict


def video_config(
    case: str = "base", *, width: int | None = None, depth: int | None = None, registers: int = 16
) -> dict:
    """The configuration of a golden case, with other sizes where they are given."""
    config = json.loads((TOKENIZERS / case / "config.json").read_text())["video_flex_tok"]
    for side in ("encoder", "decoder"):
        for name, entry in config[side]["module_dict"].items():
            if width and "dim" in entry:
                entry["dim"] = width
            if depth and "depth" in entry:
                entry["depth"] = depth
            if "n_max" in entry:
                entry["n_max"] = registers
            if name == "dec_registers_posemb_module":
                entry["max_sizes"] = [max(registers, 16)] * 2
    return config


def image_config(case: str = "base") -> dict:
    """A FlexTok configuration of small sizes."""
    text = json.dumps(video_config(case)).replace("videoflextok.", "flextok.")
    text = text.replace("RegistersTemporal2D", "Registers1D").replace("SequenceInterleavePacker", "SequencePacker")
    text = text.replace("SequenceInterleavedUnpacker", "SequenceUnpacker").replace("[1, 2, 2]", "[2, 2]")
    text = text.replace("[8, 8, 8]", "[8, 8]").replace("time_block_causal_last", "causal_last")
    config = json.loads(text.replace('"time_block_causal"', '"full"'))
    encoder, decoder = (config[side]["module_dict"] for side in ("encoder", "decoder"))
    encoder["enc_seq_packer"]["return_materialized_mask"] = True
    decoder["dec_seq_packer"]["return_materialized_mask"] = True
    del encoder["enc_register_module"]["t_max"], decoder["dec_prefix_masking"]
    decoder["dec_registers_posemb_module"]["max_sizes"] = [16]
    config["regularizer"]["packed_call"] = True
    pipeline = config["pipeline"]
    del pipeline["cond_vae_latents_key"]
    pipeline["_target_"] = "flextok.flow_matching.pipelines.MinRFPipeline"
    pipeline["noised_images_read_key"] = pipeline.pop("noised_videos_read_key")
    return config


def build(config: dict) -> nn.Module:
    """Encoder, decoder, FSQ and pipeline of a configuration around :class:`SmallVAE`, with random weights."""
    from hydra.utils import instantiate

    parts = {name: instantiate(config[name]) for name in ("encoder", "decoder", "regularizer", "pipeline")}
    if config["_target_"].startswith("flextok."):
        from flextok.flextok_wrapper import FlexTok as Model

        parts["flow_matching_noise_module"] = nn.Identity()
    else:
        from videoflextok.wrappers import VideoFlexTok as Model
    model = Model(vae=SmallVAE(), **parts).eval()
    for module in model.modules():
        # FlexTok compiles FlexAttention for every shape; its own other choice is SDPA with the materialized mask
        if hasattr(module, "use_flex_attention"):
            module.use_flex_attention = False
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights at which every part matters: the published initialisation has zeros in gates and heads."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 and "registers" not in name else 0.3
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())
