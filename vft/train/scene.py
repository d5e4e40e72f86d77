"""The random choices of a procedural scene: a moving "dead leaves" picture, back to front, painted by
:mod:`vft.train.render`. Units: :mod:`vft.train.procedural`.

Choices are drawn in one order that never changes, so a clip is the same wherever it is painted; what follows from them
is computed for all objects of a clip at once.
"""

from dataclasses import dataclass

import numpy as np

FAMILIES = ("pan", "zoom", "rotate", "translate", "orbit", "bounce", "pulse", "still")
SHAPES = ("ellipse", "polygon", "leaf", "ring", "blob")
SHARES = np.array([0.3, 0.3, 0.2, 0.08, 0.12]).cumsum()
# sides that a polygon has at most: fewer are filled with the last one
SIDES = 6
# that an object's motion is made of, with its depth and margin
NUMBERS = 16
TEXELS = 64
TAU = 2 * np.pi

# What an object looks like. shape: what its outline needs, see vft.train.render; soft: one over the width of its edge
# in pixels; texture: one over the step, and the offset; shade: slope of its brightness; halo, shadow: strength, and one
# over the width; line: strength, and width; window: first and last (excluded) row and column that it is painted in.
OBJECT = np.dtype(
    [
        ("shape", "f4", 3 * SIDES), ("soft", "f4"), ("colour", "f4", 3), ("contrast", "f4"), ("texture", "f4", 3),
        ("shade", "f4", 2), ("halo", "f4", 2), ("shadow", "f4", 2), ("line", "f4", 2), ("window", "f4", 4),
    ]
)  # fmt: skip
# Of a clip: the background, which is multiplied by dim[0], plus dim[1]; the light, as its mean and slopes in x and y;
# vignette, contrast of the film around a half, and strength of its noise.
CLIP = np.dtype(
    [
        ("colour", "f4", 3), ("contrast", "f4"), ("texture", "f4", 3), ("ramp", "f4", (3, 2)), ("dim", "f4", 2),
        ("light", "f4", 3), ("vignette", "f4"), ("tone", "f4"), ("noise", "f4"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All that decides a clip's pixels, in arrays of one row an object, back to front.

    motion ``[N, T, 7]``: the affine map from the screen to an object's own axes, and pixels a local unit; track ``[T,
    6]``: the map of the background. kinds: into SHAPES; images: which of ``materials [5, 3, 64, 64]`` an object shows,
    the background's is behind them. grain ``[3, T, H, W]``: the film's noise, or None; blur: the lens's in pixels.
    """

    size: int
    frames: int
    clip: np.ndarray
    track: np.ndarray
    objects: np.ndarray
    motion: np.ndarray
    kinds: np.ndarray
    images: np.ndarray
    materials: np.ndarray
    blur: float = 0.0
    grain: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the pixels, as :attr:`torch.Tensor.shape`."""
        return self.frames, self.size, self.size, 3


def generator(seed: int, index: int) -> np.random.Generator:
    """Random numbers of clip (seed, index)."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got {seed} and {index}")
    return np.random.default_rng((seed, index))


class Scene:
    """One clip's choices: the camera's at once, then a call for the background and for each object."""

    def __init__(self, rng, family, size, frames):
        self.rng, self.family, self.size, self.frames = rng, family, size, frames
        self.time = np.arange(frames) / 16 * rng.uniform(0.3, 1.0)
        self.gains = _motion_gains(rng, family)
        self.tint = _chroma(rng) * rng.uniform(0, 0.7)
        self.materials = _materials(rng)
        self.clip = np.zeros((), CLIP)
        self.clip["dim"], self.clip["tone"] = (1, 0), 1
        # of each object: appearance, kind, image, and the numbers of its motion
        self.drawn = []
        self._aim_camera()

    def _aim_camera(self):
        rng, gains, time = self.rng, self.gains, self.time
        heading, phase = rng.uniform(0, TAU, 2)
        eased = time + rng.uniform(0, 0.1) * (np.sin(TAU * time + phase) - np.sin(phase))
        self.pan = gains["pan"] * rng.uniform(0.5, 1.3) * np.outer([np.cos(heading), np.sin(heading)], eased)
        self.log_zoom = gains["zoom"] * rng.choice([-1, 1]) * rng.uniform(0.5, 1.0) * eased
        self.roll = gains["rotate"] * rng.choice([-1, 1]) * rng.uniform(0.4, 1.4) * eased

    def draw_background(self):
        rng, clip = self.rng, self.clip
        clip["ramp"] = rng.normal(0, 0.1, (3, 2)) + rng.normal(0, 0.15, 2)
        clip["colour"], clip["contrast"] = self._colour(), rng.uniform(0.3, 0.8)
        self.image = int(rng.integers(2))
        clip["texture"] = 1 / rng.uniform(1.5, 4), *rng.uniform(-1, 1, 2)

    def draw_object(self, depth):
        """One object whose motion under the camera is scaled by depth (parallax)."""
        rng, unit = self.rng, self.size / 64
        look = np.zeros((), OBJECT)
        kind, look["shape"] = _shape(rng)
        radius = _power_law(rng, 0.11, 0.9)
        softness = rng.uniform(2, 6) * unit if rng.random() < 0.2 else 1.0
        halo = rng.uniform(2, 5) * unit if rng.random() < 0.3 else 0.0
        motion = self._draw_motion(radius)
        look["soft"] = 1 / softness
        look["halo"] = (0.45, 0.5 / halo) if halo else 0
        look["colour"], image, contrast = self._colour(), int(rng.integers(len(self.materials))), rng.uniform(0.3, 1.5)
        look["contrast"] = contrast if rng.random() < 0.75 else 0
        shade = rng.normal(0, 0.2, 2)
        look["shade"] = shade if rng.random() < 0.6 else 0
        offset = rng.uniform(-1, 1, 2)
        look["texture"] = radius / rng.uniform(1, 3), *offset
        self.drawn.append((look, kind, image, (depth, max(softness, 2 * halo), *motion)))

    def _draw_motion(self, radius):
        """What :func:`_paths` makes the motion of."""
        rng = self.rng
        angles = rng.uniform(0, TAU, 4)
        start = rng.uniform(-1.2, 1.2, 2)
        draw = rng.uniform
        rest = (draw(0.3, 1.4), draw(0.8, 2.5), draw(0.6, 1.4), draw(0.4, 0.9), draw(-1.5, 1.5), draw(0, 0.4))
        return np.log(radius), *angles, *start, *rest, draw(0.3, 0.7)

    def plan(self):
        """Draws the light, the last thing that is drawn, and derives what is painted."""
        slope = self.rng.normal(0, 0.15, 2)
        self.clip["light"] = self.rng.uniform(0.85, 1.1), *slope
        looks, kinds, images, numbers = zip(*self.drawn, strict=True) if self.drawn else ((),) * 4
        objects = np.array(list(looks), OBJECT)
        motion, windows = self._moved(np.array(numbers, float).reshape(-1, NUMBERS))
        objects["window"] = windows
        # what no frame shows is not painted
        shown = (windows[:, 0] < windows[:, 1]) & (windows[:, 2] < windows[:, 3])
        return Plan(
            self.size, self.frames, self.clip, self.to_local(0.3, np.zeros((1, 2, 1)))[0], objects[shown],
            motion[shown], np.array(kinds, int)[shown], np.array([*np.array(images, int)[shown], self.image]),
            self.materials,
        )  # fmt: skip

    def _moved(self, numbers):
        """Motion ``[N, T, 7]`` and windows ``[N, 4]`` of objects."""
        depth, margin, rest = numbers[:, 0, None], numbers[:, 1, None], numbers[:, 2:]
        centre, angle, log_scale = _paths(rest, self.gains, self.time)
        pixels = np.exp(log_scale + depth * self.log_zoom) * self.size / 2
        windows = self._windows(depth, centre, pixels + margin)
        affine = self.to_local(depth[..., None], centre, angle, log_scale)
        return np.concatenate([affine, pixels[..., None].astype(np.float32)], 2), windows

    def to_local(self, depth, centre, angle=0.0, log_scale=0.0):
        """Affine maps ``[N, T, 6]`` from the screen to objects' own axes; centre ``[N, 2, T]``, the rest ``[N, T]``."""
        shrink = np.exp(-log_scale - np.reshape(depth, (-1, 1)) * self.log_zoom)
        cos, sin = np.cos(self.roll + angle) * shrink, np.sin(self.roll + angle) * shrink
        u, v = _rotation(angle, depth * self.pan - centre)
        scale = np.exp(-log_scale)
        return np.stack([cos, sin, u * scale, -sin, cos, v * scale], -1).astype(np.float32)

    def _windows(self, depth, centre, reach):
        """Rows and columns that a disc around centre ``[N, 2, T]`` of `reach [N, T]` pixels touches in any frame."""
        screen = np.stack(_rotation(-self.roll, centre - depth[..., None] * self.pan), 1)
        pixel = (screen * np.exp(depth * self.log_zoom)[:, None] + 1) * (self.size / 2)
        first = np.floor((pixel - reach[:, None]).min(2)).clip(0, self.size)
        last = np.ceil((pixel + reach[:, None]).max(2)).clip(0, self.size)
        return np.stack([first[:, 1], last[:, 1], first[:, 0], last[:, 0]], 1)

    def _colour(self):
        """A random colour [3] near the clip's tint."""
        colour = self.rng.uniform(0.08, 0.92) + 0.22 * (self.tint + _chroma(self.rng))
        return np.clip(colour, 0, 1)


def _paths(numbers, gains, time):
    """Centre ``[N, 2, T]``, angle ``[N, T]`` and log scale ``[N, T]`` of objects in the world."""
    columns = numbers.T[:, :, None]
    log_radius, heading, phase, beat, start, x, y, far, turns, rate, jump, twist, wobble, swell = columns
    along = gains["translate"] * far * time
    centre = np.stack(_rotation(
        gains["orbit"] * turns * time, np.stack([x + along * np.cos(heading), y + along * np.sin(heading)], 1)
    ), 1)  # fmt: skip
    hop = np.abs(np.sin(np.pi * rate * time + phase)) - np.abs(np.sin(phase))
    centre[:, 1] -= gains["bounce"] * jump * hop
    wave = np.sin(TAU * rate * time + beat)
    angle = start + gains["spin"] * (twist * time + wobble * wave)
    return centre, angle, log_radius + gains["pulse"] * swell * wave


def _motion_gains(rng, family):
    """Strength of each motion: 1 for the clip's family, a little of some others."""
    rest = rng.choice([0.0, 0.04]) if family == "still" else 0.2
    gains = {name: rest * rng.random() * (rng.random() < 0.4) for name in FAMILIES[:-1]}
    gains[family] = 1.0
    gains["spin"] = rest if family == "still" else 0.5 + 0.5 * (family == "translate")
    return gains


def _materials(rng):
    """Textures [5, 3, N, N] whose channels share most of their variation, as in nature; the first 2 are plain."""
    images = [_one_over_f(rng, rng.uniform(*powers)) for powers in ((0.9, 1.3), (1.3, 2.0))]
    images += [np.concatenate([0.6 * _pattern(rng) + 0.4 * images[k][k:][:1], images[k][1:]]) for k in range(2)]
    images.append(images[0][::-1, ::-1])
    mixes = 0.14 * np.ones((3, 1)) * [1, 0.15, 0.15] + 0.035 * rng.normal(size=(len(images), 3, 3))
    flat = np.stack(images).reshape(len(images), 3, -1)
    return (mixes.astype(np.float32) @ flat).reshape(len(images), 3, TEXELS, TEXELS)


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
    place = np.arange(TEXELS) * wave
    near, far = np.cos(angle) * place, np.sin(angle) * place
    # of sums of a row's and a column's angle: sines of 2 N numbers, not of N * N
    a, b = _sine_of_sums(far, near), _sine_of_sums(near, -far)
    kind = rng.integers(3)
    level = a if kind == 0 else a * b if kind == 1 else a + b - 1
    return 1.5 * np.tanh(3 * level)[None]


def _sine_of_sums(rows, columns):
    """sin(rows[i] + columns[j]), [N, N]."""
    sums = np.outer(np.sin(rows), np.cos(columns)) + np.outer(np.cos(rows), np.sin(columns))
    return sums.astype(np.float32)


def _chroma(rng):
    """A random colour direction [3] without luminance, mostly between orange and blue."""
    return rng.normal() * np.array([0.8, -0.1, -0.7]) + rng.normal() * np.array([-0.25, 0.2, -0.35])


def _power_law(rng, low, high):
    """A radius with density r**-2 on [low, high]."""
    return 1 / rng.uniform(1 / high, 1 / low)


def _rotation(angle, points):
    """Points ``[2, T]`` or ``[N, 2, T]`` turned by ``angle``: x and y."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[..., 0, :], points[..., 1, :]
    return cos * x + sin * y, cos * y - sin * x


def polygon(normals, distances):
    """The shape of the half-planes normals [n, 2] . (u, v) <= distances [n]."""
    sides = np.concatenate([normals, distances[:, None]], 1)
    return np.concatenate([sides, np.repeat(sides[-1:], SIDES - len(sides), 0)]).flatten()


def _shape(rng):
    """A random outline in the unit circle: its kind and numbers."""
    kind = int(SHARES.searchsorted(rng.random(), "right"))
    numbers = np.zeros(3 * SIDES)
    match SHAPES[kind]:
        case "ellipse":
            # half-axes 1 and what is drawn
            numbers[0] = 1 / rng.uniform(0.35, 1)
        case "polygon":
            numbers = _polygon(rng)
        case "leaf":
            # the intersection of two circles: tips at u = +-1
            width = rng.uniform(0.25, 0.8)
            rise = (1 - width * width) / (2 * width)
            numbers[:2] = rise, rise + width
        case "ring":
            width = np.float32(rng.uniform(0.12, 0.3))
            numbers[:2] = 1 - width, width
        case "blob":
            # radius 0.7 + a cos(3 angle) + b sin(2 angle)
            numbers[:3] = 0.7, *rng.uniform(-0.15, 0.15, 2)
    return kind, numbers


def _polygon(rng):
    """A convex polygon of 3 to 6 sides, scaled into the unit circle."""
    sides = int(rng.integers(3, 7))
    angles = (np.arange(sides) + rng.uniform(-0.15, 0.15, sides)) * TAU / sides
    distances = rng.uniform(0.6, 1, sides)
    turn, following = np.roll(angles, -1) - angles, np.roll(distances, -1)
    corners = (distances**2 + following**2 - 2 * distances * following * np.cos(turn)) / np.sin(turn) ** 2
    return polygon(np.stack([np.cos(angles), np.sin(angles)], 1), distances / np.sqrt(corners.max()))
