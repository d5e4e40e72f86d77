"""One procedural scene: a moving "dead leaves" picture, painted back to front. Units: :mod:`vft.train.procedural`."""

import numpy as np
import torch
import torch.nn.functional as F

FAMILIES = ("pan", "zoom", "rotate", "translate", "orbit", "bounce", "pulse", "still")
SHAPES = ("ellipse", "polygon", "leaf", "ring", "blob")
TEXELS = 64
TAU = 2 * np.pi


def generator(seed: int, index: int) -> np.random.Generator:
    """Random numbers of clip (seed, index)."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got {seed} and {index}")
    return np.random.default_rng((seed, index))


class Scene:
    """One clip under construction: a canvas [3, T, H, W] in [0, 1] that objects are painted on, back to front."""

    def __init__(self, rng, family, size, frames):
        self.rng, self.family, self.size = rng, family, size
        self.time = np.arange(frames) / 16 * rng.uniform(0.3, 1.0)
        self.axis = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
        self.canvas = np.empty((3, frames, size, size), np.float32)
        self.gains = _motion_gains(rng, family)
        self.tint = _chroma(rng) * rng.uniform(0, 0.7)
        self.materials = _materials(rng)
        self._aim_camera()

    def _aim_camera(self):
        rng, gains, time = self.rng, self.gains, self.time
        heading, phase = rng.uniform(0, TAU, 2)
        eased = time + rng.uniform(0, 0.1) * (np.sin(TAU * time + phase) - np.sin(phase))
        self.pan = gains["pan"] * rng.uniform(0.5, 1.3) * np.outer([np.cos(heading), np.sin(heading)], eased)
        self.log_zoom = gains["zoom"] * rng.choice([-1, 1]) * rng.uniform(0.5, 1.0) * eased
        self.roll = gains["rotate"] * rng.choice([-1, 1]) * rng.uniform(0.4, 1.4) * eased

    def draw_background(self):
        rng = self.rng
        to_local = self._world_to_local(0.3, np.zeros((2, 1)))
        u, v = plane(to_local, self.axis, self.axis)
        slope = rng.normal(0, 0.1, (3, 2)) + rng.normal(0, 0.15, 2)
        ramp = [a * self.axis[None, :] + b * self.axis[:, None] for a, b in slope.astype(np.float32)]
        image = self._colour() + rng.uniform(0.3, 0.8) * self.materials[rng.integers(2)]
        self.canvas[:] = _sample(image, u, v, rng.uniform(1.5, 4), rng.uniform(-1, 1, 2))
        self.canvas += np.stack(ramp)[:, None]

    def draw_object(self, depth):
        """Paints one object whose motion under the camera is scaled by depth (parallax)."""
        rng = self.rng
        shape, reach = _shape(rng)
        radius = _power_law(rng, 0.11, 0.9)
        softness = rng.uniform(2, 6) * self.size / 64 if rng.random() < 0.2 else 1.0
        halo = rng.uniform(2, 5) * self.size / 64 if rng.random() < 0.3 else 0.0
        centre, angle, log_scale = self._object_motion(radius)
        material, offset = self._material(), rng.uniform(-1, 1, 2)
        texture_step = rng.uniform(1, 3) / radius
        # pixels per local unit, [T]
        pixels = np.exp(log_scale + depth * self.log_zoom) * self.size / 2
        rows, columns = self._bounds(depth, centre, pixels * reach + max(softness, 2 * halo))
        if rows.stop <= rows.start or columns.stop <= columns.start:
            return
        to_local = self._world_to_local(depth, centre, angle, log_scale)
        u, v = plane(to_local, self.axis[columns], self.axis[rows])
        # signed distance to the outline in pixels, [T, h, w]
        distance = shape(u, v) * pixels.astype(np.float32)[:, None, None]
        region = self.canvas[:, :, rows, columns]
        if halo:
            region *= 1 - 0.45 * np.clip(1 - distance * (0.5 / halo), 0, 1) ** 2
        alpha = np.clip(0.5 - distance * (1 / softness), 0, 1)
        paint = _paint(*material, u, v, texture_step, offset)
        paint -= region
        paint *= alpha
        region += paint
        self._trace(region, distance)

    def _trace(self, region, distance):
        """What an object gets on top, in its part of the canvas; distance in pixels to its outline, [T, h, w]."""

    def develop(self):
        """The finished clip under one smooth light: uint8 [T, H, W, 3]."""
        slope = self.rng.normal(0, 0.15, 2).astype(np.float32)
        light = self.rng.uniform(0.85, 1.1) + slope[0] * self.axis[None, :] + slope[1] * self.axis[:, None]
        self.canvas *= np.maximum(light, 0.3, dtype=np.float32) * np.float32(255)
        self.canvas += 0.5
        np.clip(self.canvas, 0, 255, out=self.canvas)
        return np.ascontiguousarray(self.canvas.astype(np.uint8).transpose(1, 2, 3, 0))

    def _object_motion(self, radius):
        """Centre [2, T], angle [T] and log scale [T] of one object in the world."""
        rng, gains, time = self.rng, self.gains, self.time
        heading, phase, beat, start = rng.uniform(0, TAU, 4)
        centre = rng.uniform(-1.2, 1.2, (2, 1)) + np.zeros((2, len(time)))
        centre += gains["translate"] * rng.uniform(0.3, 1.4) * np.outer([np.cos(heading), np.sin(heading)], time)
        turn = gains["orbit"] * rng.uniform(0.8, 2.5) * time
        centre = _rotation(turn, centre)
        rate = rng.uniform(0.6, 1.4)
        hop = np.abs(np.sin(np.pi * rate * time + phase)) - abs(np.sin(phase))
        centre[1] -= gains["bounce"] * rng.uniform(0.4, 0.9) * hop
        spin = gains["spin"] * (rng.uniform(-1.5, 1.5) * time + rng.uniform(0, 0.4) * np.sin(TAU * rate * time + beat))
        swell = gains["pulse"] * rng.uniform(0.3, 0.7) * np.sin(TAU * rate * time + beat)
        return centre, start + spin, np.log(radius) + swell

    def _world_to_local(self, depth, centre, angle=0.0, log_scale=0.0):
        """Per-frame affine map [T, 2, 3] from the screen to an object's own axes."""
        shrink = np.exp(-log_scale - depth * self.log_zoom)
        cos, sin = np.cos(self.roll + angle) * shrink, np.sin(self.roll + angle) * shrink
        shift = _rotation(angle, depth * self.pan - centre) * np.exp(-log_scale)
        return np.stack([np.stack([cos, sin, shift[0]], -1), np.stack([-sin, cos, shift[1]], -1)], 1)

    def _bounds(self, depth, centre, reach):
        """The rows and columns that a disc around centre [2, T] of `reach` [T] pixels touches in any frame."""
        screen = _rotation(-self.roll, centre - depth * self.pan) * np.exp(depth * self.log_zoom)
        pixel = (screen + 1) * (self.size / 2)
        first = np.floor(np.min(pixel - reach, 1)).astype(int).clip(0, self.size)
        last = np.ceil(np.max(pixel + reach, 1)).astype(int).clip(0, self.size)
        return slice(first[1], last[1]), slice(first[0], last[0])

    def _colour(self):
        """A random colour [3, 1, 1] near the clip's tint."""
        colour = self.rng.uniform(0.08, 0.92) + 0.22 * (self.tint + _chroma(self.rng))
        return np.clip(colour, 0, 1).astype(np.float32)[:, None, None]

    def _material(self):
        """Texture image [3, N, N], or one colour [3, 1, 1], and the slope of the shading (or None)."""
        rng = self.rng
        image, texture, contrast = self._colour(), rng.integers(len(self.materials)), rng.uniform(0.3, 1.5)
        if rng.random() < 0.75:
            image = image + np.float32(contrast) * self.materials[texture]
        slope = rng.normal(0, 0.2, 2).astype(np.float32)
        return image, slope if rng.random() < 0.6 else None


def _motion_gains(rng, family):
    """Strength of each motion: 1 for the clip's family, a little of some others."""
    rest = rng.choice([0.0, 0.04]) if family == "still" else 0.2
    gains = {name: rest * rng.random() * (rng.random() < 0.4) for name in FAMILIES[:-1]}
    gains[family] = 1.0
    gains["spin"] = rest if family == "still" else 0.5 + 0.5 * (family == "translate")
    return gains


def _materials(rng):
    """Texture images [3, N, N] whose channels share most of their variation, as in nature; the first 2 are plain."""
    images = [_one_over_f(rng, rng.uniform(*powers)) for powers in ((0.9, 1.3), (1.3, 2.0))]
    images += [np.concatenate([0.6 * _pattern(rng) + 0.4 * images[k][k:][:1], images[k][1:]]) for k in range(2)]
    images.append(images[0][::-1, ::-1])
    mixes = 0.14 * np.ones((3, 1)) * [1, 0.15, 0.15] + 0.035 * rng.normal(size=(len(images), 3, 3))
    return [(m @ i.reshape(3, -1)).reshape(i.shape) for m, i in zip(mixes.astype(np.float32), images, strict=True)]


def _one_over_f(rng, power):
    """Three periodic random fields [3, N, N], unit variance, amplitude falling as frequency**-power."""
    fy, fx = np.fft.fftfreq(TEXELS)[:, None], np.fft.rfftfreq(TEXELS)[None]
    stretch = np.exp(rng.normal(0, 0.4))
    frequency = np.sqrt((fx * stretch) ** 2 + (fy / stretch) ** 2 + (0.5 / TEXELS) ** 2)
    noise = rng.standard_normal((3, TEXELS, TEXELS // 2 + 1, 2), dtype=np.float32)
    spectrum = noise.view(np.complex64)[..., 0] * (frequency**-power).astype(np.float32)
    spectrum[:, 0, 0] = 0
    fields = np.fft.irfft2(spectrum, s=(TEXELS, TEXELS)).astype(np.float32)
    return fields / fields.std(axis=(1, 2), keepdims=True)


def _pattern(rng):
    """Stripes, a checkerboard or dots, soft-edged, [1, N, N] in [-1.5, 1.5]."""
    angle, wave = rng.uniform(0, TAU), TAU / rng.uniform(5, 16)
    x, y = np.meshgrid(np.arange(TEXELS) * wave, np.arange(TEXELS) * wave)
    a, b = np.sin(np.cos(angle) * x + np.sin(angle) * y), np.sin(np.cos(angle) * y - np.sin(angle) * x)
    kind = rng.integers(3)
    level = a if kind == 0 else a * b if kind == 1 else a + b - 1
    return (1.5 * np.tanh(3 * level)).astype(np.float32)[None]


def _chroma(rng):
    """A random colour direction [3] without luminance, mostly between orange and blue."""
    return rng.normal() * np.array([0.8, -0.1, -0.7]) + rng.normal() * np.array([-0.25, 0.2, -0.35])


def _power_law(rng, low, high):
    """A radius with density r**-2 on [low, high]."""
    return 1 / rng.uniform(1 / high, 1 / low)


def _rotation(angle, points):
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * points[0] + sin * points[1], cos * points[1] - sin * points[0]])


def plane(affine, x, y):
    """Local coordinates u, v [T, h, w] of pixel centres x [w], y [h] under affine [T, 2, 3]."""
    affine = affine.astype(np.float32)[..., None, None]
    return tuple(affine[:, i, 0] * x + (affine[:, i, 1] * y[:, None] + affine[:, i, 2]) for i in (0, 1))


def _sample(image, u, v, step, offset):
    """Bilinear lookup of image [3, N, N] at (u, v) / step + offset, mirrored outside [-1, 1]: [3, T, h, w]."""
    grid = np.empty((1, u.shape[0] * u.shape[1], u.shape[2], 2), np.float32)
    for axis, coordinate in enumerate((u, v)):
        grid[0, ..., axis] = (coordinate * np.float32(1 / step) + np.float32(offset[axis])).reshape(grid.shape[1:3])
    image, grid = torch.from_numpy(image[None]), torch.from_numpy(grid)
    out = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    return out.numpy().reshape(3, *u.shape)


def _paint(image, slope, u, v, step, offset):
    """An object's colour [3, T, h, w] at local coordinates u, v."""
    if image.size == 3:
        paint = np.empty((3, *u.shape), np.float32)
        paint[:] = image[..., None]
    else:
        paint = _sample(image, u, v, step, offset)
    if slope is not None:
        paint *= np.float32(1) + slope[0] * u + slope[1] * v
    return paint


def _shape(rng):
    """A random outline: (signed distance function of local u, v in local units, radius that contains it)."""
    kind = SHAPES[rng.choice(len(SHAPES), p=[0.3, 0.3, 0.2, 0.08, 0.12])]
    if kind == "ellipse":
        return _ellipse(rng.uniform(0.35, 1)), 1.0
    if kind == "polygon":
        return _polygon(rng)
    if kind == "leaf":
        return _leaf(rng.uniform(0.25, 0.8)), 1.0
    if kind == "ring":
        width = np.float32(rng.uniform(0.12, 0.3))
        return lambda u, v: np.abs(np.sqrt(u * u + v * v) - (1 - width)) - width, 1.0
    return _blob(rng)


def _ellipse(ratio):
    """Half-axes 1 and ratio; f (f - 1) / |grad f**2 / 2| approximates the distance."""
    inverse = np.float32(1 / ratio)

    def distance(u, v):
        w = v * inverse
        uu, ww = u * u, w * w
        f = uu + ww
        return (f - np.sqrt(f)) / np.sqrt(uu + ww * inverse**2 + np.float32(1e-6))

    return distance


def _polygon(rng):
    """A convex polygon of 3 to 6 sides, scaled into the unit circle."""
    sides = int(rng.integers(3, 7))
    angles = (np.arange(sides) + rng.uniform(-0.15, 0.15, sides)) * TAU / sides
    normals = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    distances = rng.uniform(0.6, 1, sides)
    turn, following = np.roll(angles, -1) - angles, np.roll(distances, -1)
    corners = (distances**2 + following**2 - 2 * distances * following * np.cos(turn)) / np.sin(turn) ** 2
    distances = (distances / np.sqrt(corners.max())).astype(np.float32)

    def distance(u, v):
        out = None
        for (nx, ny), d in zip(normals, distances, strict=True):
            side = nx * u + (ny * v - d)
            out = side if out is None else np.maximum(out, side, out=out)
        return out

    return distance, 1.0


def _leaf(width):
    """The intersection of two circles: tips at u = +-1, half-width `width`."""
    rise = np.float32((1 - width * width) / (2 * width))
    radius = np.float32(rise + width)
    return lambda u, v: np.sqrt(u * u + (np.abs(v) + rise) ** 2) - radius


def _blob(rng):
    """A star-like outline, radius 0.7 + a cos(3 angle) + b sin(2 angle)."""
    a, b = rng.uniform(-0.15, 0.15, 2).astype(np.float32)

    def distance(u, v):
        r = np.sqrt(u * u + v * v) + np.float32(1e-6)
        c, s = u / r, v / r
        return r - (np.float32(0.7) + a * c * (4 * c * c - 3) + 2 * b * c * s)

    return distance, 1.0
