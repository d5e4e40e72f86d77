"""Paints the plans of procedural scenes with PyTorch: one by one, each object in its own window, or many clips at once.

A pixel c under an object becomes keep * c + add: its halo and the rest of it where the edge is soft, then its colour,
then the traces that drawing leaves on both. What keep and add are depends on the object alone, so those of all objects
of one outline are computed together; only the sum goes back to front.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F

from flexkernels.upload import upload

from .scene import CLIP, OBJECT, SIDES, Plan

# pixels of all frames of clips that are painted at once, each in memory for every object
AT_ONCE = 1 << 20
# in pixels from an outline, where nothing of an object is seen
FAR = 1e6


def one(plan: Plan) -> torch.Tensor:
    """A clip on the CPU: uint8 ``[T, H, W, 3]``. Objects are painted in their windows, and what is off is left out."""
    axis = _axis(plan.size, torch.device("cpu"))
    materials, motion = torch.from_numpy(plan.materials), _paths(torch.from_numpy(plan.motion))
    clip = _numbers(plan.clip)
    # images[-1] is the background's
    track = _paths(torch.from_numpy(plan.track)[None])
    canvas = _background(clip, track.unbind(), materials[plan.images[-1]][None], axis)
    for i, kind in enumerate(plan.kinds):
        look = _numbers(plan.objects[i])
        top, bottom, left, right = map(int, look["window"])
        image = materials[plan.images[i]][None] if look["contrast"] else None
        path = motion[:, i : i + 1].unbind()
        keep, add = _layer(kind, look, path, image, axis[left:right], axis[top:bottom, None], None)
        window = canvas[:, :, :, top:bottom, left:right]
        torch.addcmul(add, window, keep[:, None], out=window)
    blur = torch.from_numpy(_blur(plan.size, plan.blur))[None] if plan.blur else None
    grain = None if plan.grain is None else torch.from_numpy(plan.grain)[None]
    return _developed(canvas, clip, axis, blur, grain, None)[0]


def together(plans: Sequence[Plan], device: torch.device) -> torch.Tensor:
    """Clips of one size and length on any device: uint8 ``[B, T, H, W, 3]``. The host copies once for each group of
    AT_ONCE pixels and waits for nothing."""
    shape = plans[0].frames, plans[0].size, plans[0].size
    group = max(1, AT_ONCE // (shape[0] * shape[1] * shape[2]))
    parts = [_together(plans[i : i + group], device) for i in range(0, len(plans), group)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _together(plans: Sequence[Plan], device: torch.device) -> torch.Tensor:
    # with the most objects first, those that have a next one are always the first clips
    order = sorted(range(len(plans)), key=lambda i: -len(plans[i].kinds))
    plans = [plans[i] for i in order]
    counts = [len(plan.kinds) for plan in plans]
    kinds = np.concatenate([plan.kinds for plan in plans])
    by_kind = np.argsort(kinds, kind="stable")
    place, first = np.argsort(by_kind), [0, *accumulate(counts)]
    layers = [[place[first[c] + slot] for c in range(len(plans)) if counts[c] > slot] for slot in range(max(counts))]
    images = np.concatenate([5 * c + plan.images[:-1] for c, plan in enumerate(plans)])[by_kind]
    behind = [5 * c + plan.images[-1] for c, plan in enumerate(plans)]
    noisy = [c for c, plan in enumerate(plans) if plan.grain is not None]
    indices = [images, behind, *layers, noisy, np.argsort(order)]
    objects = np.concatenate([plan.objects for plan in plans])[by_kind]
    blurred = any(plan.blur for plan in plans)
    numbers = [
        objects.view(np.float32).reshape(len(objects), OBJECT.itemsize // 4),
        np.concatenate([plan.motion for plan in plans])[by_kind],
        np.stack([plan.clip for plan in plans]).view(np.float32).reshape(len(plans), CLIP.itemsize // 4),
        np.stack([plan.track for plan in plans]),
        np.concatenate([plan.materials for plan in plans]),
        np.stack([_blur(plan.size, plan.blur) for plan in plans if blurred]) if blurred else np.zeros(0, np.float32),
        np.stack([plans[c].grain for c in noisy]) if noisy else np.zeros(0, np.float32),
    ]
    index = torch.from_numpy(np.concatenate([np.asarray(i, np.int64) for i in indices]))
    index, looks, motion, clips, track, materials, blur, grain = upload(
        [index, *(torch.from_numpy(np.ascontiguousarray(x)) for x in numbers)], device
    )
    images, behind, *layers, noisy, back = index.split([len(i) for i in indices])

    axis = _axis(plans[0].size, device)
    clip = _fields(clips, CLIP)
    canvas, motion = _background(clip, _paths(track).unbind(), materials[behind], axis), _paths(motion)
    rows = torch.arange(plans[0].size, device=device)
    top, bottom, left, right = _fields(looks, OBJECT)["window"]
    inside = ((rows >= left) & (rows < right)) & ((rows[:, None] >= top) & (rows[:, None] < bottom))
    keep = canvas.new_empty(len(objects), *canvas.shape[2:])
    add = canvas.new_empty(len(objects), *canvas.shape[1:])
    ends = np.searchsorted(np.sort(kinds), np.arange(len(OUTLINES) + 1))
    for kind, (a, b) in enumerate(pairwise(ends)):
        if a < b:
            look, image = _fields(looks[a:b], OBJECT), materials[images[a:b]]
            keep[a:b], add[a:b] = _layer(kind, look, motion[:, a:b].unbind(), image, axis, axis[:, None], inside[a:b])
    for layer in layers:
        under = canvas[: len(layer)]
        torch.addcmul(add[layer], under, keep[layer][:, None], out=under)
    return _developed(canvas, clip, axis, blur if blurred else None, grain if len(noisy) else None, noisy)[back]


def _axis(size: int, device: torch.device) -> torch.Tensor:
    """Pixel centres in [-1, 1]."""
    return ((torch.arange(size, device=device, dtype=torch.float64) + 0.5) * (2 / size) - 1).float()


def _numbers(row: np.ndarray) -> dict:
    """Fields of one row as numbers of the host: a launch takes them by value. Colours and ramps are tensors."""
    found = {name: row[name].tolist() for name in row.dtype.names}
    found["colour"] = torch.tensor(found["colour"]).view(1, 3, 1, 1, 1)
    if "ramp" in found:
        found["ramp"] = torch.tensor(found["ramp"]).T.reshape(2, 1, 3, 1, 1, 1)
    return found


def _fields(rows: torch.Tensor, dtype: np.dtype) -> dict[str, torch.Tensor]:
    """Fields of float32 rows ``[N, columns]``: ``[N, 1, 1, 1]``, of several numbers ``[n, N, 1, 1, 1]``, the colour
    ``[N, 3, 1, 1, 1]``, ramps ``[2, N, 3, 1, 1, 1]``."""
    found = {}
    for name, (kind, offset) in dtype.fields.items():
        part = rows[:, offset // 4 : (offset + kind.itemsize) // 4]
        if name == "colour":
            found[name] = part[..., None, None, None]
        elif name == "ramp":
            found[name] = part.view(-1, 3, 2).permute(2, 0, 1)[..., None, None, None]
        else:
            found[name] = part.T[..., None, None, None] if kind.shape else part[..., None, None]
    return found


def _on(value) -> bool:
    """Whether a part of the picture is painted: not where the host knows its strength to be 0."""
    return isinstance(value, torch.Tensor) or bool(value)


def _paths(motion: torch.Tensor) -> torch.Tensor:
    """``[N, T, n]`` -> ``[n, N, T, 1, 1]``."""
    return motion.movedim(2, 0)[..., None, None]


def _plane(path: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Local coordinates u, v ``[N, T, h, w]`` of pixel centres x ``[w]``, y ``[h, 1]`` under affine maps."""
    return [path[i] * x + (path[i + 1] * y + path[i + 2]) for i in (0, 3)]


def _sample(look: dict, image: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Bilinear lookup of the colour plus contrast times images ``[N, 3, n, n]`` at (u, v) / step + offset, mirrored
    outside [-1, 1]: ``[N, 3, T, h, w]``."""
    contrast, (scale, *offset) = look["contrast"], look["texture"]
    if isinstance(contrast, torch.Tensor):
        image = image * contrast + look["colour"][..., 0]
    else:
        image = torch.add(look["colour"][..., 0], image, alpha=contrast)
    grid = u.new_empty(*u.shape, 2)
    torch.add(u * scale, offset[0], out=grid[..., 0])
    torch.add(v * scale, offset[1], out=grid[..., 1])
    flat = F.grid_sample(image, grid.flatten(1, 2), padding_mode="reflection", align_corners=False)
    return flat.unflatten(2, u.shape[1:3])


def _background(clip: dict, path, image: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """Canvases ``[B, 3, T, H, W]``."""
    canvas = _sample(clip, image, *_plane(path, axis, axis[:, None]))
    across, down = clip["ramp"]
    canvas += across * axis + down * axis[:, None]
    gain, shift = clip["dim"]
    if isinstance(gain, torch.Tensor):
        gain, shift = gain[:, None], shift[:, None]
    return canvas.mul_(gain).add_(shift) if _on(shift) else canvas


def _layer(kind: int, look: dict, path, image, x, y, inside) -> tuple[torch.Tensor, torch.Tensor]:
    """keep ``[N, T, h, w]`` and add ``[N, 3, T, h, w]`` of objects of one kind, at pixel centres x ``[w]`` and y
    ``[h, 1]``.

    path: affine maps and pixels a local unit, 7 times ``[N, T, 1, 1]``. image ``[N, 3, n, n]``, or None where none has
    a texture. inside: where an object may be painted, None for all.
    """
    u, v = _plane(path, x, y)
    # in pixels to the outline
    distance = OUTLINES[kind](u, v, look["shape"]).mul_(path[6])
    if inside is not None:
        distance = torch.where(inside, distance, FAR)
    alpha = (0.5 - distance * look["soft"]).clamp_(0, 1)
    keep = 1 - alpha
    strength, width = look["halo"]
    if _on(strength):
        keep *= 1 - strength * (1 - distance * width).clamp_(0, 1).square_()
    strength, width = look["shadow"]
    if _on(strength):
        # below the object's edge, fading outwards: the object itself keeps its colour
        near = (1 - distance * width).clamp_(0, 1).mul_(distance.clamp(0, 1))
        trace = 1 - strength * near.square_()
        keep, alpha = keep * trace, alpha * trace
    strength, width = look["line"]
    if _on(strength):
        trace = 1 - strength * (width - (distance + width).abs_()).clamp_(0, 1)
        keep, alpha = keep * trace, alpha * trace
    paint = look["colour"] if image is None else _sample(look, image, u, v)
    across, down = look["shade"]
    if _on(across):
        alpha *= 1 + across * u + down * v
    return keep, paint * alpha[:, None]


def _developed(canvas, clip: dict, axis, blur, grain, noisy) -> torch.Tensor:
    """Finished clips under one smooth light: uint8 ``[B, T, H, W, 3]``. blur: matrices ``[B, H, H]``; grain: the noise
    of the clips ``noisy``, None for all."""
    if blur is not None:
        shape, each = canvas.shape, blur[:, None]
        canvas = (each @ canvas.flatten(1, 2) @ each.mT).view(shape)
    vignette, tone, strength = (
        x[:, None] if isinstance(x, torch.Tensor) else x for x in (clip["vignette"], clip["tone"], clip["noise"])
    )
    if _on(vignette):
        edge = axis**2 + axis[:, None] ** 2
        canvas = canvas * (1 - 0.5 * vignette * edge)
        canvas.sub_(0.5).mul_(tone).add_(0.5)
    if grain is not None:
        if noisy is None:
            canvas += strength * grain
        else:
            canvas.index_add_(0, noisy, strength[noisy] * grain)
    mean, across, down = clip["light"]
    light = (mean + across * axis + down * axis[:, None]).clamp_(min=0.3).mul_(255)
    canvas.mul_(light[:, None] if light.dim() == 4 else light).add_(0.5).clamp_(0, 255)
    return canvas.permute(0, 2, 3, 4, 1).to(torch.uint8).contiguous()


def _blur(size: int, sigma: float) -> np.ndarray:
    """The Gaussian blur of an axis as a matrix, mirrored at the border as far as there are pixels to mirror."""
    matrix = np.eye(size, dtype=np.float32)
    if not sigma:
        return matrix
    reach = min(int(np.ceil(3 * sigma)), size - 1)
    steps = np.arange(-reach, reach + 1)
    taps = np.exp(-0.5 * (steps / sigma) ** 2)
    taps /= taps.sum()
    rows = np.arange(size)[:, None]
    source = np.abs(rows + steps)
    source = size - 1 - np.abs(size - 1 - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.broadcast_to(rows, source.shape), source), taps)
    return matrix.astype(np.float32)


def _ellipse(u, v, shape):
    # f (f - 1) / |grad f**2 / 2| approximates the distance; f**2 = u**2 + (v / ratio)**2
    inverse = shape[0]
    uu, ww = u * u, (v * inverse).square_()
    f = uu + ww
    gradient = (uu.add_(ww.mul_(inverse * inverse)).add_(1e-6)).sqrt_()
    return f.sub_(f.sqrt()).div_(gradient)


def _polygon(u, v, shape):
    found = None
    for i in range(SIDES):
        side = shape[3 * i] * u + (shape[3 * i + 1] * v - shape[3 * i + 2])
        found = side if found is None else torch.maximum(found, side, out=found)
    return found


def _leaf(u, v, shape):
    return (u * u + (v.abs() + shape[0]).square_()).sqrt_().sub_(shape[1])


def _ring(u, v, shape):
    return (u * u + v * v).sqrt_().sub_(shape[0]).abs_().sub_(shape[1])


def _blob(u, v, shape):
    r = (u * u + v * v).sqrt_().add_(1e-6)
    c, s = u / r, v / r
    return r - (shape[0] + shape[1] * c * (4 * c * c - 3) + 2 * shape[2] * c * s)


# signed distances to outlines in local units, in the order of vft.train.scene.SHAPES
OUTLINES = (_ellipse, _polygon, _leaf, _ring, _blob)
