"""`vft` behind the forwards of a published FlexTok or VideoFlexTok model, over that model's own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

import flexkernels

from ..checkpoint import published_name
from ..config import TokenizerConfig, parse_config
from ..layers import Merged
from ..solver import evaluations, sample, schedule
from ..tokenizer import Tokenizer
from .module_dict import Keys, Reader, describe


def share(model: nn.Module, config: TokenizerConfig, encoder: bool) -> Tokenizer:
    """A ``vft.Tokenizer`` whose parameters are the published model's own Parameter objects, or only its decoder's.

    Raises ValueError naming a parameter that is missing, has another shape, or would not be used.
    """
    with torch.device("meta"):
        tokenizer = Tokenizer(config, type(model).__name__)
    if not encoder:
        tokenizer.encoder = nn.Identity()
    sides = ("encoder.", "decoder.") if encoder else ("decoder.",)
    theirs = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(sides) and not name.startswith(config.ignored)
    }
    for name, wanted in list(tokenizer.named_parameters()):
        published = published_name(name, config)
        given = theirs.pop(published, None)
        # an image model's registers lack the axis of frames
        if given is None or tuple(wanted.shape) not in (given.shape, (1, *given.shape)):
            got = "none" if given is None else list(given.shape)
            raise ValueError(f"{published} must have shape {list(wanted.shape)}, got {got}")
        owner, _, leaf = name.rpartition(".")
        setattr(tokenizer.get_submodule(owner), leaf, given)
    if theirs:
        raise ValueError(f"{next(iter(theirs))} is not a weight that a published tokenizer has")
    return tokenizer.eval()


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of one object; returns what puts it back."""
    held = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before) if held else delattr(owner, name)


class Engine:
    """Computes what a published tokenizer's encoder, FSQ module and decoder do, by ``vft`` over their weights.

    A sample is ``[1, C, T, H, W]``, or ``[1, C, H, W]`` of an image model. Gradients are off.

    Args:
        model: the published tokenizer.
        readers: how its configuration is read, see :func:`describe`.
        encoder: whether its encoder is replaced.
        dtype: None to compute in the weights' dtype, over them; another one computes over a copy cast to it.
        compat, collapse: as in ``vft.Tokenizer.decode_latents``.
    """

    def __init__(
        self, model: nn.Module, readers: Mapping[str, Reader], *, encoder: bool, dtype: torch.dtype | None,
        compat: Iterable[str], collapse: bool,
    ) -> None:  # fmt: skip
        self.keys = Keys.of(model, encoder)
        self.config = parse_config(describe(model, readers, encoder))
        self.decoder, self.regularizer = model.decoder, model.regularizer
        self.encoder = model.encoder if encoder else None
        self.compat, self.collapse = tuple(compat), collapse
        self.tokenizer = share(model, self.config, encoder)
        self.shared = dtype is None or dtype == self.tokenizer.dtype
        if not self.shared:
            self.tokenizer = copy.deepcopy(self.tokenizer).to(dtype).requires_grad_(False)
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Puts this engine behind the modules' forwards. Weights move into joined memory, and need no gradient."""
        if self.shared:
            for parameter in self.tokenizer.parameters():
                if parameter.requires_grad:
                    self._undo.append(lambda p=parameter: p.requires_grad_(True))
                    parameter.requires_grad_(False)
        self._undo.append(self._separate)
        if self.encoder is not None:
            self.replace(self.encoder, "forward", self.encode)
        self.replace(self.decoder, "forward", self.velocity)
        self.replace(self.regularizer, "forward_z", self.quantize)
        self.tokenizer.prepare()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append(replace_attribute(owner, name, value))

    def __getstate__(self) -> dict[str, Any]:
        # a copy or pickle computes as this one; what it was before stays with this one
        return vars(self) | {"_undo": []}

    def remove(self) -> None:
        """Undoes :meth:`install`: every weight is bitwise what it was, in memory of its own."""
        while self._undo:
            self._undo.pop()()

    def _separate(self) -> None:
        for module in self.tokenizer.modules():
            if isinstance(module, Merged):
                module.separate()

    def quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes float32 ``[..., D]`` and ids int64 ``[...]``, for the FSQ module's forward_z."""
        if self.regularizer.training:
            return type(self.regularizer).forward_z(self.regularizer, z)
        return flexkernels.fsq_quantize(z.float(), self.config.levels)

    @torch.no_grad()
    def encode(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """The encoder's forward: latents -> values before quantisation ``[1, T, N, D]``, or ``[1, N, D]``."""
        keys, n = self.keys, self.config.registers
        self._check_mode(self.encoder)
        sizes = data_dict.get(keys.register_sizes)
        if sizes is not None and any(int(size) != n for size in sizes):
            raise ValueError(f"{keys.register_sizes} must be {n}, the registers of this model, got {list(sizes)}")
        given = data_dict[keys.latents]
        latents = self._samples(keys.latents, given)
        with _no_autocast(latents):
            values = self.tokenizer.prepare().encoder(latents).split([x.shape[1] * n for x in latents])
        shapes = [(1, n) if x.dim() == 4 else (1, x.shape[2], n) for x in given]
        data_dict[keys.values] = [v.view(*shape, -1) for v, shape in zip(values, shapes, strict=True)]
        return data_dict

    @torch.no_grad()
    def velocity(self, data_dict: dict[str, Any]) -> dict[str, Any]:
        """The decoder's forward: noised latents, times, codes and what to do with registers -> velocities."""
        keys = self.keys
        self._check_mode(self.decoder)
        given = data_dict[keys.noised]
        latents = self._samples(keys.noised, given)
        codes, keep, prefix, registers = self.read_registers(data_dict, latents)
        null = [bool(flag) for flag in self._read(data_dict, keys.null, len(latents), False)]
        with _no_autocast(latents):
            out = self.tokenizer.prepare().decoder(
                latents, data_dict[keys.timesteps], codes, keep, prefix, null, self.collapse, registers
            )
        data_dict[keys.velocity] = [v.reshape(x.shape) for v, x in zip(out, given, strict=True)]
        return data_dict

    @torch.no_grad()
    def sample(
        self, data_dict, noise, timesteps: int, guidance, prefix=None, prefix_mode: str = "clean", verbose: bool = True
    ) -> list[torch.Tensor]:
        """Integrates the flow from noise by as many Euler steps; conditional and unconditional sequences in one call.

        noise: list of samples; prefix: list of clean first frames ``[1, C, k, H, W]`` or None. Guidance takes its norms
        over T, H and W of each channel of a video, but over C, H and W of an image. Returns a list of float32 samples.
        """
        from tqdm import tqdm

        self._check_mode(self.decoder)
        latents = self._samples("noise", noise)
        codes, keep, frames, registers = self.read_registers(data_dict, latents)
        # the very times of the published loop, which a guidance scale may compare with
        plan = evaluations("euler", schedule([i / timesteps for i in range(timesteps, -1, -1)]))
        with _no_autocast(latents), tqdm(total=timesteps, disable=not verbose) as bar:
            velocity = self.tokenizer.guided_velocity(
                latents, plan, codes, keep, frames, collapse=self.collapse, registers=registers
            )
            out = sample(
                velocity, [x[0].float() if x.dim() == 5 else x.float() for x in noise], plan, guidance=guidance,
                prefix=None if prefix is None else [p[0] for p in prefix], prefix_mode=prefix_mode,
                compat=self.compat, progress=lambda done: bar.update(done - bar.n), graphs=self.tokenizer.step_graphs,
            )  # fmt: skip
        return [x.reshape(z.shape) for x, z in zip(out, noise, strict=True)]

    def read_registers(self, data_dict: dict[str, Any], latents: list[torch.Tensor]):
        """Codes ``[sum T*l, D]``, registers kept and frames masked of each sample, and l, the registers of a frame."""
        quants, count, dims = data_dict[self.keys.quants], len(latents), len(self.config.levels)
        registers = quants[0].shape[-2]
        for q, x in zip(quants, latents, strict=True):
            if q.shape[-2:] != (registers, dims) or q.numel() != x.shape[1] * registers * dims:
                raise ValueError(
                    f"{self.keys.quants} must be [1, {x.shape[1]}, {registers}, {dims}] a sample, with the latents' "
                    f"frames and equally many registers, got {list(q.shape)}"
                )
        if not 1 <= registers <= self.config.registers:
            raise ValueError(f"{self.keys.quants} must have 1 to {self.config.registers} registers, got {registers}")
        keep = [int(k) for k in self._read(data_dict, self.keys.keep, count, registers)]
        if min(keep) < 0:
            raise ValueError(f"{self.keys.keep} must be at least 0, got {keep}")
        prefix = [int(k) for k in self._read(data_dict, self.keys.prefix, count, 0)]
        codes = torch.cat([q.reshape(-1, dims) for q in quants]).to(self.tokenizer.dtype)
        return codes, [min(k, registers) for k in keep], prefix, registers

    def _read(self, data_dict, key: str | None, count: int, default) -> list:
        if key is None or key not in data_dict:
            return [default] * count
        values = list(data_dict[key])
        if len(values) < count:
            raise ValueError(f"{key} must hold one value a sample ({count}), got {len(values)}")
        return values[:count]

    def _samples(self, name: str, given) -> list[torch.Tensor]:
        # [1, C, T, H, W] or [1, C, H, W] each -> [C, T, H, W]
        channels, patch, out = self.config.channels, self.config.patch, []
        for x in given:
            sample = x[0] if x.dim() == 5 else x.transpose(0, 1)
            whole = x.dim() in (4, 5) and not any(n % p for n, p in zip(sample.shape[1:], patch, strict=True))
            if not whole or x.shape[0] != 1 or x.shape[1] != channels or 0 in x.shape:
                raise ValueError(
                    f"{name} must be [1, {channels}, ...] a sample, whole patches of {list(patch)}, got {list(x.shape)}"
                )
            if x.device != self.tokenizer.device:
                raise ValueError(f"{name} must be on {self.tokenizer.device}, got {x.device}")
            out.append(sample)
        return out

    @staticmethod
    def _check_mode(module: nn.Module) -> None:
        if module.training:
            raise RuntimeError(
                "an accelerated tokenizer only infers: call eval(), or flexkernels.restore() to train it"
            )


def _no_autocast(latents: list[torch.Tensor]):
    return torch.autocast(latents[0].device.type, enabled=False)
