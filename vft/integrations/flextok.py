"""FlexTok's published image tokenizer (apple/ml-flextok): ``FlexTok``.

An image is a video of one latent frame: the ``causal_last`` mask is then the one that keeps registers causal within a
frame, positions are a table of rows and columns alone, and guidance takes its norms over channels too.
"""

from __future__ import annotations

from typing import Any

import torch

from flexkernels import APG, CFG
from flexkernels.integrations import Change, is_a

from .module_dict import READERS, SCHEMA, Reader
from .videoflextok import Pipeline, install

# fixed in the published sampling loop
MOMENTUM, NORM_THRESHOLD = -0.5, 2.5
MASKS = {"causal_last": "time_block_causal_last"}


def knows(model: Any) -> bool:
    return is_a(model, "flextok.flextok_wrapper.FlexTok")


def accelerate(model: Any, *, level: int = 2, dtype: torch.dtype | None = None, collapse: bool = True) -> Change:
    """Runs ``vft`` over the model's own weights; options as in :func:`videoflextok.accelerate`."""
    options = {"encoder": True, "dtype": dtype, "compat": (), "collapse": collapse}
    return install(model, IMAGE_READERS, ImagePipeline, level, **options)


def _frame(read: Reader) -> Reader:
    # patches of one frame
    def reader(m):
        entry = read(m)
        return entry | {"patch_sizes": [1, *entry["patch_sizes"]]}

    return reader


def _as(target: str, read: Reader) -> Reader:
    return lambda m: {"_target_": SCHEMA + target, **read(m)}


# FlexTok's modules as those that do the same to a video of one frame
IMAGE_READERS: dict[str, Reader] = READERS | {
    "PatchEmbedder": _frame(READERS["PatchEmbedder"]),
    "ToPatchesLinearHead": _frame(READERS["ToPatchesLinearHead"]),
    "Registers1D": _as(
        "model.preprocessors.registers.RegistersTemporal2D",
        lambda m: {
            "dim": m.registers.shape[-1], "t_max": 1, "n_max": m.n_max, "n_eval": m.n_eval,
            "ordering_mode": m.ordering_mode,
        },
    ),
    "BlockWiseSequencePacker": _as(
        "model.preprocessors.flex_seq_packing.BlockWiseSequenceInterleavePacker",
        lambda m: {"mask_mode": MASKS.get(m.mask_mode, m.mask_mode)},
    ),
    "SequenceUnpacker": _as("model.postprocessors.seq_unpacking.SequenceInterleavedUnpacker", lambda m: {}),
}  # fmt: skip


class ImagePipeline(Pipeline):
    """In place of MinRFPipeline."""

    replaces = "flextok.flow_matching.pipelines.MinRFPipeline"

    @torch.no_grad()
    def __call__(
        self, data_dict, generator=None, timesteps=25, vae_image_sizes=None, verbose=True, guidance_scale=1.0,
        perform_norm_guidance=False,
    ):  # fmt: skip
        """The published arguments; a batch flagged as unconditional takes the published loop."""
        guidance = None
        if callable(guidance_scale) or guidance_scale != 1.0:
            apg = APG(guidance_scale, NORM_THRESHOLD, 0.0, MOMENTUM)
            guidance = apg if perform_norm_guidance else CFG(guidance_scale)
        if not self.answers(data_dict, guidance):
            return super().__call__(
                data_dict, generator, timesteps, vae_image_sizes, verbose, guidance_scale, perform_norm_guidance
            )
        noise = self._noise(data_dict, generator, vae_image_sizes)
        data_dict[self.reconst_write_key] = self.engine.sample(data_dict, noise, timesteps, guidance, verbose=verbose)
        return data_dict

    def _noise(self, data_dict, generator, sizes) -> list[torch.Tensor]:
        if self.noise_read_key is not None:
            return list(data_dict[self.noise_read_key])
        if sizes is None:
            sizes = data_dict[self.target_sizes_read_key]
        elif isinstance(sizes, int):
            sizes = [(sizes, sizes)] * len(data_dict[self.latents_read_key])
        device = self.model.device
        shapes = [(1, self.out_channels, *size) for size in sizes]
        return [torch.randn(shape, generator=generator, device=device) for shape in shapes]
