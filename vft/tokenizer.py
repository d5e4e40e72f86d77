"""The video tokenizer: encoder, FSQ and rectified-flow decoder (VideoFlexTok, arXiv 2604.12887).

frames --codec--> latents --encoder--> register values --FSQ--> ids [T, N]
ids --FSQ--> codes --decoder, flow ODE--> latents --codec--> frames
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import torch
from torch import nn

import flexkernels
from flexkernels import APG, CFG
from flexkernels.typed import called_as

from . import checkpoint, semantok, share
from .budget import Curves, Predictor, choose
from .codec import Codec
from .config import TokenizerConfig, parse_config
from .fingerprint import check_tokens, fingerprint
from .fp8 import check_device
from .graphs import StepGraphs
from .layers import Decoder, Encoder, Merged
from .solver import evaluations, sample, schedule
from .stills import hold, join_ids, repeats, still_groups
from .tokens import VideoTokens
from .transfer import Download, Uploads
from .vae import load_codec
from .velocity import GuidedVelocity
from .video import Video, cut_chunks, open_video
from .video.frames import fitted, from_uint8

# the published sampler; a checkpoint may state its own
DEFAULT_STEPS, DEFAULT_GUIDANCE = 40, APG(scale=25.0, threshold=0.6, eta=0.0, momentum=0.0)
DEFAULT = "default"


class Tokenizer(nn.Module):
    """Encodes video to ids int64 ``[T, N]`` (N registers for each of T latent frames) and back.

    Make one with :meth:`from_pretrained`. ``name`` is written into token files; ``registers`` is N; ``size`` is the
    square working size in pixels, or None where the model takes any size. On CUDA the solver's steps are replayed from
    CUDA graphs, one for each set of shapes (the latest few are kept), unless ``cuda_graphs`` is set to False.
    """

    def __init__(self, config: TokenizerConfig, name: str = "tokenizer") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.registers, self.size = config.registers, config.size
        self.steps: int = DEFAULT_STEPS
        self.guidance: CFG | APG | None = DEFAULT_GUIDANCE
        self._codec: Codec | None = None
        self._codec_state: dict[str, torch.Tensor] | None = None
        self._fingerprint: str | None = None
        self.cuda_graphs, self._graphs = True, StepGraphs()
        self._uploads: Uploads | None = None

    @classmethod
    def from_pretrained(
        cls,
        reference: str | os.PathLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        weights: str | None = None,
        check_finite: bool = True,
    ) -> Tokenizer:
        """Loads ``"tiny"``, a directory, a safetensors file, or a hub id ``"org/repo[@revision][/subdirectory]"``.

        ``weights="fp8"`` keeps the matrices of the decoder's blocks as float8_e4m3fn and rounds what they are
        multiplied with to it too (docs/tokenizer.md): for GPUs that multiply it, with ``dtype`` bfloat16; elsewhere
        the same formula in ``dtype``. ids do not depend on it.
        ``check_finite=False`` loads weights that are NaN or infinite, and does not look for them.

        Raises:
            CheckpointError, ConfigError (both ValueError): the checkpoint is missing, damaged, or does not fit.
        """
        if weights not in (None, "fp8"):
            raise ValueError(f"weights must be None or 'fp8', got {weights!r}")
        if weights == "fp8":
            check_device(device)
        raw, tensors, name = checkpoint.read(reference)
        raw, tensors = semantok.unwrap(raw, tensors)
        sampler = raw.pop("sampler", None)
        model = cls(parse_config(raw), name)
        model._codec_state = checkpoint.load_weights(model, model.config, tensors, check_finite)
        # of the weights as they are stored, whatever they are cast to
        model._fingerprint = fingerprint(model)
        if sampler is not None:
            model.steps, model.guidance = _read_sampler(sampler)
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return model if weights is None else model.quantize()

    def quantize(self) -> Tokenizer:
        """Rounds the matrices of the decoder's blocks to fp8, in place; see :meth:`from_pretrained`.

        Raises ValueError on a GPU that does not multiply fp8.
        """
        check_device(self.device)
        for module in self.decoder.modules():
            if isinstance(module, Merged) and not module.quantized:
                module.quantize()
        return self

    def save(
        self,
        path: str | os.PathLike,
        dtype: torch.dtype | None = None,
        *,
        codec: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes one safetensors file that :meth:`from_pretrained` reads, under the published names.

        ``codec``: the latent codec's weights that are in it, by default those that the checkpoint of this model had.
        ``dtype`` is that of the stored weights, by default the model's own.

        Raises ValueError for a model with fp8 weights, which are rounded.
        """
        self.check_exact()
        guidance = self.guidance and {"type": type(self.guidance).__name__, **dataclasses.asdict(self.guidance)}
        extra = {"sampler": {"steps": self.steps, "guidance": guidance}}
        codec = self.codec_state if codec is None else codec
        checkpoint.write(path, self, self.config, extra, dtype, codec or {})

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        data: str | None = None,
        evaluation: dict | None = None,
    ) -> None:
        """Writes a folder that :meth:`from_pretrained` reads: config.json, model.safetensors, and a card, README.md.

        The latent codec's weights are in it where the checkpoint of this model had them. The card states what the model
        is, ``data`` (what it was trained on) and ``evaluation`` (the JSON of ``vft eval``). Files there are replaced.

        Raises:
            OSError: a file cannot be written.
            ValueError: the model has fp8 weights, which are rounded.
        """
        self.check_exact()
        share.save_folder(self, folder, dtype, data, evaluation)

    def push_to_hub(self, repo: str, *, private: bool = False, **options: Any) -> str:
        """Uploads what :meth:`save_pretrained` writes (``options`` are its) to ``"org/repo"``, made if missing.

        Needs huggingface_hub, whose login is used. Returns the address of the commit.
        """
        return share.push(self, repo, private, **options)

    def check_exact(self) -> None:
        """Raises ValueError where weights were rounded to fp8."""
        if any(isinstance(module, Merged) and module.quantized for module in self.modules()):
            raise ValueError("a model with fp8 weights cannot be saved: save the one it was made from")

    @property
    def codec_state(self) -> dict[str, torch.Tensor] | None:
        """The latent codec's weights as the checkpoint had them, of an embedded codec its refiner's; empty or None
        where it had none."""
        return self._codec_state

    @property
    def device(self) -> torch.device:
        return self.decoder.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.head.weight.dtype

    @property
    def fingerprint(self) -> str:
        """Names what decides the ids, see :mod:`vft.fingerprint`: the checkpoint's, or of the weights as they are."""
        return self._fingerprint or fingerprint(self)

    def train(self, mode: bool = True) -> Tokenizer:
        """As in torch; what is trained has no longer the checkpoint's fingerprint."""
        if mode:
            self._fingerprint = None
        return super().train(mode)

    @called_as(nn.Module.load_state_dict)
    def load_state_dict(self, *args, **options) -> Any:
        """As in torch; these weights have another fingerprint."""
        self._fingerprint = None
        return super().load_state_dict(*args, **options)

    @property
    def codec(self) -> Codec:
        """The latent codec (frames <-> latents), loaded on first use."""
        if self._codec is None:
            config = self.config
            self.hold_codec(load_codec(config.codec, self._codec_state or None, config.channels).to(self.device))
        return self._codec

    def hold_codec(self, codec: Codec) -> None:
        """Sets the latent codec. It moves with the tokenizer; its weights are none of the tokenizer's parameters."""
        object.__setattr__(self, "_codec", codec)

    def _apply(self, fn: Callable, recurse: bool = True) -> Tokenizer:
        if self._codec is not None:
            self._codec._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def encode_latents(self, latents: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``[B, C, T, H, W]``, or a list of ``[C, T, H, W]`` of any shapes -> list of ids int64 ``[T, N]``.

        Raises ValueError for a wrong channel count, sides that are no multiple of the patch, more frames than the
        positional tables cover, or non-finite values.
        """
        return self._ids(self._check_latents("latents", latents))

    def _ids(self, latents: list[torch.Tensor]) -> list[torch.Tensor]:
        _, ids = flexkernels.fsq_quantize(self.prepare().encoder(latents), self.config.levels, codes=False)
        sizes = [x.shape[1] * self.registers for x in latents]
        return [i.view(-1, self.registers) for i in ids.split(sizes)]

    @torch.no_grad()
    def velocity(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        t: float,
        ids: Sequence[torch.Tensor],
        keep: int | Sequence[int] | None = None,
        unconditional: bool | Sequence[bool] = False,
        prefix_frames: int | Sequence[int] = 0,
        *,
        collapse: bool = True,
    ) -> list[torch.Tensor]:
        """The decoder's velocity of latents x at time t (1: noise, 0: clean), list of ``[C, T, H, W]`` in x's dtype.

        Args:
            x: ``[B, C, T, H, W]`` or list of ``[C, T, H, W]``.
            ids: one int ``[T, l]`` tensor a sample, l <= N; fewer than N registers mean ``keep <= l``.
            keep: registers used of each frame, 0 to N (default N): one int, or one a sample.
            unconditional: drop all registers for the learned null token; one bool, or one a sample.
            prefix_frames: number of first latent frames given as clean conditioning, whose registers are masked.
            collapse: compute registers that must stay identical once (exact; where the model allows it).
        """
        x = self._check_latents("x", x)
        codes, keep = self._check_ids(ids, keep, x)
        null = self._per_sample("unconditional", unconditional, len(x), bool)
        prefix = self._per_sample("prefix_frames", prefix_frames, len(x), int)
        if not 0 <= t <= 1:
            raise ValueError(f"t must be between 0 and 1, got {t}")
        self._check_register_ops(keep, prefix, null, x)
        time = torch.full((1,), t, device=self.device)
        out = self.prepare().decoder(x, time, codes, keep, prefix, null, collapse)
        return [v.to(z.dtype) for v, z in zip(out, x, strict=True)]

    def prepare(self) -> Tokenizer:
        """Joins the weights that one product serves (q, k, v; the gated MLP's two), in place, once, at first use."""
        for module in self.modules():
            if isinstance(module, Merged):
                module.prepare()
        return self

    @torch.no_grad()
    def decode_latents(
        self,
        ids: Sequence[torch.Tensor],
        keep: int | Sequence[int] | None = None,
        steps: int | Sequence[float] | None = None,
        guidance: CFG | APG | str | None = DEFAULT,
        solver: str = "euler",
        noise: Sequence[torch.Tensor] | None = None,
        prefix: Sequence[torch.Tensor] | None = None,
        compat: Sequence[str] = (),
        *,
        prefix_mode: str = "clean",
        shift: float = 1.0,
        null_every: int = 1,
        collapse: bool = True,
        grid: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[torch.Tensor]:
        """Samples latents from ids by integrating the flow from noise; conditional and unconditional in one call.

        Args:
            ids, keep: as in :meth:`velocity`.
            steps, shift: the schedule, see :func:`vft.solver.schedule`; by default as many uniform steps as the
                checkpoint states, else the published 40.
            guidance: None, CFG or APG, by default what the checkpoint states, else the published APG; its scale may be
                a function of t, such as :func:`vft.solver.interval`.
            solver: one of :data:`vft.solver.SOLVERS`.
            noise: list of ``[C, T, H, W]``; by default drawn on the CPU from ``seed`` in the shape ``grid``.
            prefix: clean latents ``[C, k, H, W]`` of each sample's first k frames, k >= 1.
            null_every: the unconditional velocity is computed in every so many evaluations, see
                :func:`vft.solver.sample`.
            collapse: as in :meth:`velocity`.
            grid: latent height and width where no noise is given, one pair or one a sample; default the working size.

        Returns:
            list of float32 ``[C, T, H, W]``.
        """
        guidance = self.guidance if guidance == DEFAULT else guidance
        steps = self.steps if steps is None else steps
        if noise is None:
            noise = self._noise(ids, grid, seed)
        noise = [x.float() for x in self._check_latents("noise", noise)]
        codes, keep = self._check_ids(ids, keep, noise)
        prefix = self._check_prefix(prefix, noise)
        count, frames = len(noise), [0] * len(noise) if prefix is None else [p.shape[1] for p in prefix]
        self._check_register_ops(keep, frames, [guidance is not None] * count, noise)
        plan = evaluations(solver, schedule(steps, shift))
        velocity = self.guided_velocity(noise, plan, codes, keep, frames, collapse=collapse)
        return sample(
            velocity, noise, plan, guidance=guidance, prefix=prefix, prefix_mode=prefix_mode, compat=compat,
            null_every=null_every, progress=progress, graphs=self.step_graphs,
        )  # fmt: skip

    def guided_velocity(
        self, shaped, plan, codes, keep, frames, *, collapse: bool = True, registers: int | None = None
    ) -> GuidedVelocity:
        """What :func:`vft.solver.sample` calls; the arguments are those of :class:`vft.velocity.GuidedVelocity`."""
        return GuidedVelocity(self.prepare().decoder, shaped, plan, codes, keep, frames, collapse, registers)

    @property
    def step_graphs(self) -> StepGraphs | None:
        """Where the solver's steps are replayed from; None where they are not.

        Nor are they under autocast: a graph would keep its dtypes, and read casts of weights that end with it.
        """
        served = self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        return self._graphs if self.cuda_graphs and served else None

    @overload
    def encode(
        self, video: str | os.PathLike[str] | Video, *, fps: float | None = ..., batch: int = ...,
        generator: torch.Generator | None = ..., strict: bool = ..., target_psnr: float | None = ...,
        budget: int | None = ..., predictor: Predictor | None = ..., progress: Callable[[int], None] | None = ...,
    ) -> VideoTokens: ...  # fmt: skip
    @overload
    def encode(
        self, video: torch.Tensor, *, fps: float | None = ..., batch: int = ...,
        generator: torch.Generator | None = ..., strict: bool = ..., target_psnr: float | None = ...,
        budget: int | None = ..., predictor: Predictor | None = ..., progress: Callable[[int], None] | None = ...,
    ) -> VideoTokens | list[VideoTokens]: ...  # fmt: skip
    @torch.no_grad()
    def encode(
        self,
        video: str | os.PathLike | Video | torch.Tensor,
        *,
        fps: float | None = None,
        batch: int = 8,
        generator: torch.Generator | None = None,
        strict: bool = False,
        target_psnr: float | None = None,
        budget: int | None = None,
        predictor: Predictor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> VideoTokens | list[VideoTokens]:
        """Tokenizes video of any length, chunk by chunk: memory does not grow with the length of a file.

        Args:
            video: a path; a :class:`vft.video.Video`; uint8 ``[T, H, W, 3]``; or float ``[B, 3, T, H, W]`` in
                [-1, 1] at the working size. Paths and uint8 frames are resized and centre-cropped to ``size``.
            fps: frames a second taken from a path (default: its own rate), or those of a tensor (default: 25).
            batch: chunks encoded in one packed call.
            generator: samples the codec's posterior, where it has one; by default its mean is taken.
            strict: refuse a damaged file, see :func:`vft.video.open_video`.
            target_psnr: keep the fewest registers of each video that decode to this many dB, all where none do.
            budget: tokens of all videos together, shared out for the best mean PSNR; both: at most these tokens.
            predictor: a :class:`vft.budget.Predictor` that says what k registers give, instead of decoding them.
            progress: called with the number of frames encoded of this video, after each packed call.

        Returns:
            :class:`VideoTokens`; for a float batch of B > 1, a list of B.

        A length that is not 1 + 4 n is padded with the last frame; ``frames`` keeps the true number.

        Raises:
            ValueError: an unreadable video, no frames, a wrong shape or type, non-finite values.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if target_psnr is not None and not target_psnr > 0:
            raise ValueError(f"target_psnr must be above 0, got {target_psnr}")
        # one video takes all of a budget: nothing to look at
        look = target_psnr is not None or (budget is not None and isinstance(video, torch.Tensor) and video.dim() == 5)
        curves: list[Curves] = []

        def run(frames, rate, source) -> VideoTokens:
            curves.append(Curves(self, predictor))
            return self._encode_stream(frames, rate, source, batch, generator, curves[-1:] if look else [], progress)

        tokens = self._encode_each(video, fps, strict, run)
        if target_psnr is not None or budget is not None:
            quality = [curve.psnr() if look else torch.arange(self.registers).double() for curve in curves]
            kept = choose(quality, [t.latent_frames for t in tokens], target_psnr, budget)
            tokens = [t.truncate(k) for t, k in zip(tokens, kept, strict=True)]
        return tokens[0] if len(tokens) == 1 else tokens

    def _encode_each(self, video, fps: float | None, strict: bool, run) -> list[VideoTokens]:
        # run(frames, rate, size of the source) -> tokens
        rate = 25.0 if fps is None else fps
        if isinstance(video, torch.Tensor) and video.is_floating_point():
            if video.dim() != 5 or video.shape[1] != 3:
                raise ValueError(f"video must have shape [B, 3, T, H, W], got {list(video.shape)}")
            return [run(c.unbind(1), rate, c.shape[-2:]) for c in video]
        if isinstance(video, (str, os.PathLike)):
            with open_video(video, self.size, fps=fps, strict=strict) as stream:
                source = stream.height, stream.width
                return [run(stream.frames, stream.fps, source)]
        if isinstance(video, torch.Tensor):
            video = Video(video, rate, *video.shape[1:3]) if video.dim() == 4 else video
        if not isinstance(video, Video):
            raise ValueError("video must be a path, a Video, uint8 [T, H, W, 3] or float [B, 3, T, H, W]")
        return [run(video.frames.unbind(), video.fps, (video.height, video.width))]

    def _encode_stream(
        self, frames: Iterable[torch.Tensor], fps: float, source, batch, generator, curves, progress
    ) -> VideoTokens:
        # frames: uint8 [H, W, 3] or float [3, H, W] each
        count, ids, still, stride = 0, [], [], self.codec.temporal_stride
        cut = cut_chunks(frames, self.config.chunk_size, self.config.overlap, stride)
        while group := list(islice(cut, batch)):
            count += sum(new for _, new in group)
            still += [still_groups(chunk, stride) for chunk, _ in group]
            chunks = [chunk for chunk, _ in group]
            ids += self.encode_chunks(chunks, generator)
            for curve in curves:
                curve.add(chunks, ids[-len(chunks) :])
            if progress is not None:
                progress(count)
        return self.join_chunks(ids, still, fps, count, *source)

    @torch.no_grad()
    def encode_chunks(
        self, chunks: Sequence[torch.Tensor], generator: torch.Generator | None = None
    ) -> list[torch.Tensor]:
        """Chunks of any videos in one packed call: uint8 ``[t, H, W, 3]`` or float ``[t, 3, H, W]`` in [-1, 1] each ->
        a list of ids int64 ``[1 + (t - 1) / 4, N]`` on the CPU.

        Raises ValueError for a wrong shape or non-finite values.
        """
        return self.launch_chunks(chunks, generator)()

    @torch.no_grad()
    def launch_chunks(
        self, chunks: Sequence[torch.Tensor], generator: torch.Generator | None = None
    ) -> Callable[[], list[torch.Tensor]]:
        """:meth:`encode_chunks` in two parts: gives the device all its work, and returns what waits for the ids.

        A GPU has copies of uint8 chunks on a stream of their own, so those of one call are under way while it computes
        the call before; the host waits once, in what is returned. Raises ValueError for a wrong shape; what is
        returned raises it for values that are not finite.
        """
        clips = self._chunk_inputs(chunks)
        latents: list[torch.Tensor] = [None] * len(clips)
        # the codec takes chunks of one shape, the encoder any
        for shape in dict.fromkeys(clip.shape for clip in clips):
            where = [i for i, clip in enumerate(clips) if clip.shape == shape]
            encoded = self._encode_frames(torch.stack([clips[i] for i in where]), generator)
            for i, z in zip(where, encoded, strict=True):
                latents[i] = z
        latents = self._check_latents("latents", latents, finite=False)
        finite = torch.stack([torch.isfinite(z).all() for z in latents]).all()
        # one copy, for which the device is waited for once
        coming = Download(torch.cat([*(ids.flatten() for ids in self._ids(latents)), finite.long()[None]]))

        def wait() -> list[torch.Tensor]:
            *rows, good = coming.wait().split([z.shape[1] * self.registers for z in latents] + [1])
            if not good:
                raise ValueError("latents must be finite, got NaN or infinity")
            return [ids.view(-1, self.registers) for ids in rows]

        return wait

    def _chunk_inputs(self, chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # -> float [3, t, H, W] each, those of uint8 chunks on the device
        clips = [fitted(x, self.size) if not x.is_floating_point() else x.transpose(0, 1) for x in chunks]
        if not all(torch.isfinite(x).all() for x in clips if x.is_floating_point()):
            raise ValueError("video must be finite, got NaN or infinity")
        if self._uploads is None or self._uploads.device != self.device:
            self._uploads = Uploads(self.device)
        bytes_ = [i for i, x in enumerate(clips) if not x.is_floating_point()]
        for i, x in zip(bytes_, self._uploads([clips[i] for i in bytes_]), strict=True):
            clips[i] = from_uint8(x)
        return clips

    def join_chunks(
        self, ids: Sequence[torch.Tensor], still: Sequence[list[bool]], fps: float, frames: int, height: int, width: int
    ) -> VideoTokens:
        """The tokens of one video from those of its chunks in order, see :func:`vft.stills.join_ids`; ``still`` are
        the values of :func:`vft.stills.still_groups` of each chunk."""
        rows, config = join_ids(ids, still), self.config
        return VideoTokens(
            rows, fps, frames, int(height), int(width), self.name, config.levels, config.chunk_size, self.fingerprint
        )

    @torch.no_grad()
    def decode_stream(
        self,
        tokens: VideoTokens,
        *,
        keep: int | None = None,
        steps: int | Sequence[float] | None = None,
        guidance: CFG | APG | str | None = DEFAULT,
        solver: str = "euler",
        shift: float = 1.0,
        null_every: int = 1,
        seed: int = 0,
        conditioning: torch.Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
        force: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Decodes chunk by chunk in bounded memory: yields float32 ``[3, t, H, W]`` pieces that make up all frames.

        Every chunk after the first starts from the last frame decoded so far: its latents condition the chunk, and its
        tokens stand in for the chunk's first latent frame. A latent frame that repeats the ids before it shows the last
        frame again.

        Raises ValueError for the tokens of another model, unless ``force`` is set.
        """
        if tuple(tokens.levels) != self.config.levels:
            raise ValueError(f"tokens must have levels {list(self.config.levels)}, got {list(tokens.levels)}")
        check_tokens(tokens, self, force)
        held = 1 + (tokens.latent_frames - 1) * self.codec.temporal_stride
        if tokens.frames > held:
            raise ValueError(f"tokens must hold all frames: {tokens.latent_frames} rows hold {held} of {tokens.frames}")
        times = schedule(self.steps if steps is None else steps, shift)
        count = len(times) - 1
        height, width = self.frame_size(tokens)
        generator = torch.Generator().manual_seed(seed)
        chunks = self._token_chunks(tokens.ids)
        still = self._token_chunks(repeats(tokens.ids))
        stride, left, last = self.codec.temporal_stride, tokens.frames, None
        prefix = None if conditioning is None else self._encode_frames(conditioning[None])
        for i, ids in enumerate(chunks):
            same = still[i].tolist()
            if i > 0:
                prefix = self._encode_frames(last)
                ids = torch.cat([self.encode_latents(prefix)[0][:, : ids.shape[1]].cpu(), ids])
                same = [False, *same]
            shape = self.codec.latent_shape(1 + (len(ids) - 1) * stride, height, width)
            noise = torch.randn(shape, generator=generator).to(self.device)
            # latent frames at the end that repeat what is shown need no decoding
            moving = max(len(same) - same[::-1].index(False), 1 if prefix is None else prefix.shape[2])
            report = None if progress is None else lambda n, done=i * count: progress(done + n, len(chunks) * count)
            if i > 0 and moving == 1:
                video = last
                if report is not None:
                    report(count)
            else:
                latents = self.decode_latents(
                    [ids[:moving]], keep, times, guidance, solver, [noise[:, :moving]],
                    None if prefix is None else [prefix[0]], null_every=null_every, progress=report,
                )  # fmt: skip
                video = self.codec.decode(latents[0][None]).clamp(-1, 1)
                # its first frame is the one shown last
                video = video if last is None else torch.cat([last, video[:, :, 1:]], 2)
            video = hold(video, same, stride)
            last = video[:, :, -1:]
            piece = video[0, :, (i > 0) * self.config.overlap :][:, :left]
            left -= piece.shape[1]
            yield piece

    @called_as(decode_stream)
    def decode(self, tokens: VideoTokens, **options) -> torch.Tensor:
        """Tokens to video, float32 ``[1, 3, frames, H, W]`` in [-1, 1] at the working size.

        Options (all keyword): ``keep`` (registers used a frame, 0 to N), ``steps``, ``guidance``, ``solver``, ``shift``
        and ``null_every`` (as in :meth:`decode_latents`), ``seed``, ``conditioning`` (float ``[3, 1 + 4 k, H, W]``,
        clean first frames), ``progress`` (called after each step with steps done in all and steps in all), ``force``
        (decode the tokens of another model, too).
        """
        return torch.cat(list(self.decode_stream(tokens, **options)), 1)[None]

    def _token_chunks(self, rows: torch.Tensor) -> list[torch.Tensor]:
        # rows of latent frames [T, ...]; the first chunk holds one more
        per_chunk = (self.config.chunk_size - 1) // self.codec.temporal_stride
        first, rest = rows[: 1 + per_chunk], rows[1 + per_chunk :]
        return [first, *(rest.split(per_chunk) if len(rest) else ())]

    def _encode_frames(self, frames: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.codec.encode(frames.to(self.device), generator).to(self.dtype)

    def frame_size(self, tokens: VideoTokens) -> tuple[int, int]:
        """Height and width of the frames that tokens decode to."""
        # without a working size, encode has cropped the source to whole patches
        crop = self.codec.spatial_stride * self.config.patch[1], self.codec.spatial_stride * self.config.patch[2]
        if self.size:
            return self.size, self.size
        return tokens.height // crop[0] * crop[0], tokens.width // crop[1] * crop[1]

    def _check_latents(self, name: str, latents, finite: bool = True) -> list[torch.Tensor]:
        latents = list(latents)
        if not latents:
            raise ValueError(f"{name} must hold at least one sample")
        channels, patch = self.config.channels, self.config.patch
        for x in latents:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                raise TypeError(f"{name} must be floating-point tensors, got {getattr(x, 'dtype', type(x).__name__)}")
            if x.dim() != 4 or x.shape[0] != channels:
                raise ValueError(f"{name} must be [{channels}, T, H, W] a sample, got {list(x.shape)}")
            if 0 in x.shape or any(n % p for n, p in zip(x.shape[1:], patch, strict=True)):
                raise ValueError(f"{name} must have T, H, W that are multiples of {list(patch)}, got {list(x.shape)}")
            if x.shape[1] > self.config.max_frames * patch[0]:
                raise ValueError(f"{name} must have at most {self.config.max_frames} frames, got {x.shape[1]}")
            if x.device != self.device:
                raise ValueError(f"{name} must be on {self.device}, got {x.device}")
            if finite and not torch.isfinite(x).all():
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        return latents

    def _check_ids(self, ids, keep, latents) -> tuple[torch.Tensor, list[int]]:
        """Codes ``[sum T*N, D]`` (short rows padded) and the registers kept of each sample."""
        if len(ids) != len(latents):
            raise ValueError(f"ids must hold one tensor a sample ({len(latents)}), got {len(ids)}")
        n, rows = self.registers, []
        for i, x in zip(ids, latents, strict=True):
            if i.is_floating_point() or i.dim() != 2 or i.shape[0] != x.shape[1] or not 1 <= i.shape[1] <= n:
                raise ValueError(f"ids must be int [{x.shape[1]}, 1 to {n}], got {i.dtype} {list(i.shape)}")
            low, high = (int(v) for v in i.aminmax())
            if low < 0 or high >= self.config.codebook_size:
                raise ValueError(f"ids must lie in 0..{self.config.codebook_size - 1}, got {low if low < 0 else high}")
            rows.append(nn.functional.pad(i.long(), (0, n - i.shape[1])).flatten())
        keep = self._per_sample("keep", n if keep is None else keep, len(latents), int)
        for k in keep:
            if not 0 <= k <= n:
                raise ValueError(f"keep must lie in 0..{n}, got {k}")
        keep = [min(k, i.shape[1]) for k, i in zip(keep, ids, strict=True)]
        codes = flexkernels.fsq_dequantize(torch.cat(rows).to(self.device), self.config.levels, dtype=self.dtype)
        return codes, keep

    def _check_prefix(self, prefix, latents) -> list[torch.Tensor] | None:
        if prefix is None:
            return None
        if len(prefix) != len(latents):
            raise ValueError(f"prefix must hold one tensor a sample ({len(latents)}), got {len(prefix)}")
        prefix = self._check_latents("prefix", prefix)
        for p, x in zip(prefix, latents, strict=True):
            if p.shape[1] > x.shape[1] or p.shape[2:] != x.shape[2:]:
                raise ValueError(f"prefix must fit into {list(x.shape)}, got {list(p.shape)}")
        return prefix

    def _check_register_ops(self, keep, prefix_frames, null, latents) -> None:
        needs = {
            "keep": ("keep below all registers", any(k < self.registers for k in keep)),
            "prefix": ("conditioning frames", any(prefix_frames)),
            "null": ("guidance or an unconditional pass", any(null)),
        }
        for op, (what, wanted) in needs.items():
            # conditioning frames also work in a model that has no token for them
            if wanted and op not in self.config.register_ops and op != "prefix":
                raise ValueError(f"{what} needs a {op} token, which this model does not have")
        for frames, x in zip(prefix_frames, latents, strict=True):
            if not 0 <= frames <= x.shape[1]:
                raise ValueError(f"prefix_frames must lie in 0..{x.shape[1]}, got {frames}")

    @staticmethod
    def _per_sample(name: str, value, count: int, kind: type) -> list:
        values = [value] * count if isinstance(value, (int, bool)) else list(value)
        if len(values) != count or not all(isinstance(v, (int, bool)) for v in values):
            raise ValueError(f"{name} must be one {kind.__name__} or one a sample ({count}), got {value!r}")
        return [kind(v) for v in values]

    def _noise(self, ids, grid, seed: int) -> list[torch.Tensor]:
        if grid is None:
            if self.size is None:
                raise ValueError("grid must be given where the model has no working size and no noise is given")
            grid = self.codec.latent_shape(1, self.size, self.size)[2:]
        grids = [grid] * len(ids) if isinstance(grid[0], int) else list(grid)
        generator = torch.Generator().manual_seed(seed)
        shapes = [(self.config.channels, len(i), *g) for i, g in zip(ids, grids, strict=True)]
        return [torch.randn(shape, generator=generator).to(self.device) for shape in shapes]


def _read_sampler(sampler: dict) -> tuple[int, CFG | APG | None]:
    """Steps and guidance that a checkpoint states as its defaults."""
    try:
        steps, guidance = sampler["steps"], sampler["guidance"]
        schedule(steps)
        if guidance is None:
            return steps, None
        settings = dict(guidance)
        return steps, {"CFG": CFG, "APG": APG}[settings.pop("type")](**settings)
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"sampler must state steps and guidance, got {sampler!r}") from error
