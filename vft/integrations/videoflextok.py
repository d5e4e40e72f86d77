"""VideoFlexTok's published tokenizer (apple/ml-videoflextok): ``VideoFlexTok``, alone or inside its chunking wrappers.

Replaced are the forwards of encoder, FSQ and decoder and, at level 2, the sampling pipeline: no block mask, no padding,
one packed pass for the guided step. Module tree, names and weights stay, and so does what calls these: ``tokenize``,
``detokenize``, the cutting into chunks, and the VAE.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from flexkernels import APG, CFG
from flexkernels.integrations import Change, is_a

from ..solver import COMPAT
from .engine import Engine
from .module_dict import READERS

LEVELS = (1, 2)


def knows(model: Any) -> bool:
    return is_a(model, "videoflextok.wrappers.VideoFlexTok")


def accelerate(
    model: Any,
    *,
    level: int = 2,
    encoder: bool = True,
    dtype: torch.dtype | None = None,
    compat: Iterable[str] = (),
    collapse: bool = True,
) -> Change:
    """Runs ``vft`` over the model's own weights.

    Args:
        level: 1 replaces encoder, FSQ and decoder and leaves the published sampling loop; 2 replaces the loop too.
        encoder: False leaves the encoder, for one that computes something else (SemanTok's reads other features).
        dtype: None computes in the weights' dtype without a second copy; another dtype computes over a copy cast to
            it. Autocast has no effect inside.
        compat: ``"shared_momentum"`` hands one momentum buffer from sample to sample, as the published loop does.
        collapse: compute registers that must stay identical once (exact; where the model allows it).

    Raises ValueError for a model that computes something else than the published configurations can say.
    """
    options = {"encoder": encoder, "dtype": dtype, "compat": compat, "collapse": collapse}
    return install(model, READERS, VideoPipeline, level, **options)


def install(model: Any, readers, pipeline: type, level: int, *, compat: Iterable[str], **options) -> Change:
    """Puts an engine behind a FlexTok or VideoFlexTok model; ``pipeline`` is the class that samples at level 2."""
    compat = (compat,) if isinstance(compat, str) else tuple(compat)
    if level not in LEVELS:
        raise ValueError(f"level must be 1 or 2, got {level!r}")
    if set(compat) - set(COMPAT):
        raise ValueError(f"compat must be among {', '.join(COMPAT)}, got {sorted(compat)}")
    engine = Engine(model, readers, compat=compat, **options)
    sampler = pipeline.around(model.pipeline, engine) if level == 2 else model.pipeline
    try:
        engine.install()
        engine.replace(model, "pipeline", sampler)
    except BaseException:
        engine.remove()
        raise
    replaced, left = ["regularizer", "decoder"], ["vae"]
    (replaced if options["encoder"] else left).append("encoder")
    (replaced if level == 2 else left).append("pipeline")
    # the engine lives as long as the model; a strong reference here would keep the model alive for ever
    remove = weakref.WeakMethod(engine.remove)
    return Change(replaced, left, lambda: remove()())


def _joined(own: type, published: type) -> type:
    return type(published.__name__, (own, published), {"__module__": published.__module__})


def _revived(own: type, published: type) -> Any:
    """An empty pipeline, for a copy or a pickle of one."""
    return object.__new__(_joined(own, published))


class Pipeline:
    """Stands before a published pipeline class and answers its calls by an engine; its attributes stay."""

    engine: Engine
    replaces: str

    @classmethod
    def around(cls, published: Any, engine: Engine) -> Any:
        """A copy of the pipeline object whose calls go to the engine; ValueError for another class of pipeline."""
        if not is_a(published, cls.replaces):
            raise ValueError(
                f"pipeline must be a {cls.replaces} at level 2, got {type(published).__name__}: use level=1"
            )
        made = copy.copy(published)
        made.__class__ = _joined(cls, type(published))
        made.engine = engine
        return made

    def __reduce_ex__(self, protocol):
        return _revived, type(self).__bases__, vars(self)

    def answers(self, data_dict: dict[str, Any], guidance) -> bool:
        """Whether the engine's loop computes this call; else the published loop does, over the engine's decoder."""
        # momentum goes on through steps whose scale is 1, where the engine leaves the unconditional pass out
        unsteady = guidance is not None and callable(guidance.scale) and getattr(guidance, "momentum", 0) != 0
        return self.engine.keys.null not in data_dict and not unsteady


class VideoPipeline(Pipeline):
    """In place of VideoMinRFPipeline."""

    replaces = "videoflextok.flow_matching.pipelines.VideoMinRFPipeline"

    @torch.no_grad()
    def __call__(
        self, data_dict, generator=None, timesteps=50, video_sizes=None, noise_list=None, verbose=True,
        guidance_scale=1.0, cfg_rescaler=None, perform_norm_guidance=False, momentum=0.0, eta=0.0, norm_threshold=0.6,
        cond_type="clean",
    ):  # fmt: skip
        """The published arguments; a ``cfg_rescaler`` and a batch flagged as unconditional take the published loop."""
        guidance = None
        if callable(guidance_scale) or guidance_scale != 1.0:
            apg = APG(guidance_scale, max(norm_threshold, 0), eta, momentum)
            guidance = apg if perform_norm_guidance else CFG(guidance_scale)
        if cfg_rescaler is not None or not self.answers(data_dict, guidance):
            return super().__call__(
                data_dict, generator, timesteps, video_sizes, noise_list, verbose, guidance_scale, cfg_rescaler,
                perform_norm_guidance, momentum, eta, norm_threshold, cond_type,
            )  # fmt: skip
        noise = self._noise(data_dict, generator, self._sizes(data_dict, video_sizes), noise_list)
        prefix = self._prefix(data_dict, noise)
        data_dict[self.reconst_write_key] = self.engine.sample(
            data_dict, noise, timesteps, guidance, prefix, cond_type, verbose
        )
        return data_dict

    def _sizes(self, data_dict, video_sizes) -> list[tuple[int, int, int]]:
        sizes = data_dict[self.target_sizes_read_key] if video_sizes is None else video_sizes
        if isinstance(sizes[0], int):
            sizes = [sizes] * len(data_dict[self.latents_read_key])
        return [tuple(size) for size in sizes]

    def _noise(self, data_dict, generator, sizes, noise_list) -> list[torch.Tensor]:
        device = self.model.device
        if self.noise_read_key is not None:
            return list(data_dict[self.noise_read_key])
        if self.zero_noise:
            return [torch.zeros(1, self.out_channels, *size, device=device) for size in sizes]
        if noise_list is not None:
            return [noise.to(device) for noise in noise_list[: len(sizes)]]
        shapes = [(1, self.out_channels, *size) for size in sizes]
        return [torch.randn(shape, generator=generator, device=device) for shape in shapes]

    def _prefix(self, data_dict, noise) -> list[torch.Tensor] | None:
        if self.cond_vae_latents_key is None or self.cond_vae_latents_key not in data_dict:
            return None
        prefix = data_dict[self.cond_vae_latents_key]
        prefix = list(prefix.split(1)) if isinstance(prefix, torch.Tensor) else list(prefix)
        for p, x in zip(prefix, noise, strict=True):
            fits = p.dim() == 5 and p.shape[:2] == x.shape[:2] and p.shape[3:] == x.shape[3:]
            if not fits or not 1 <= p.shape[2] <= x.shape[2]:
                raise ValueError(f"{self.cond_vae_latents_key} must fit into {list(x.shape)}, got {list(p.shape)}")
        return prefix
