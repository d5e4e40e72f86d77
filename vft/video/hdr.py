"""High dynamic range to SDR: PQ and HLG signals to sRGB with BT.709 primaries, as a table for FFmpeg's ``haldclut``.

signal --EOTF--> nits --primaries--> BT.709 --/ 203 nits--> linear, 1 is SDR white --shoulder--> [0, 1] --> sRGB

203 nits is the reference white of ITU-R BT.2408; PQ is SMPTE ST 2084, HLG is ITU-R BT.2100 on a display of 1,000 nits.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from vft.deferred import av

# AVCOL_TRC_*, AVCOL_PRI_*
PQ, HLG = 16, 18
_BT709, _DISPLAY_P3, _DCI_P3 = 1, 12, 11
WHITE, PEAK, KNEE = 203.0, 1000.0, 0.8
# the table has _LEVEL**2 points an axis
_LEVEL = 8

_XYZ = {  # chromaticities of red, green, blue; D65 white
    _BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    _DISPLAY_P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
}
_D65 = np.array([0.3127, 0.3290])


def to_sdr(signal: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """float64 ``[..., 3]`` R'G'B' in [0, 1], PQ or HLG -> sRGB in [0, 1]; unknown primaries count as BT.2020."""
    nits = _pq(signal) if transfer == PQ else _hlg(signal)
    primaries = _DISPLAY_P3 if primaries == _DCI_P3 else primaries if primaries in _XYZ else 9
    linear = nits @ (np.linalg.inv(_to_xyz(_BT709)) @ _to_xyz(primaries)).T / WHITE
    return _srgb(_shoulder(np.maximum(linear, 0)))


def _pq(signal):
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg(signal):
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return PEAK * scene * np.maximum(luminance, 1e-9)[..., None] ** 0.2


def _shoulder(linear):
    """The identity up to KNEE, then a curve of slope 1 there that reaches 1 at PEAK; the largest of R, G, B decides."""
    top = linear.max(-1, keepdims=True)
    end = (PEAK / WHITE - KNEE) / (1 - KNEE)
    x = np.clip((top - KNEE) / (1 - KNEE), 0, end)
    # x (1 + x / end**2) / (1 + x): extended Reinhard
    curve = np.where(top > KNEE, KNEE + (1 - KNEE) * x * (1 + x / end**2) / (1 + x), top)
    return linear * curve / np.maximum(top, 1e-9)


def _srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def _to_xyz(primaries: int) -> np.ndarray:
    """Matrix [3, 3] from linear R, G, B to X, Y, Z, with the white point at (1, 1, 1) of the primaries."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in _XYZ[primaries]]).T
    x, y = _D65
    white = np.array([x / y, 1, (1 - x - y) / y])
    return columns * np.linalg.solve(columns, white)


@cache
def table(transfer: int, primaries: int) -> av.VideoFrame:
    """:func:`to_sdr` as a picture for ``haldclut``: rgb48, red changes fastest, then green, then blue."""
    axis = np.linspace(0, 1, _LEVEL**2)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    values = to_sdr(np.stack([red, green, blue], -1), transfer, primaries)
    pixels = np.round(values * 65535).astype(np.uint16).reshape(_LEVEL**3, _LEVEL**3, 3)
    return av.VideoFrame.from_ndarray(pixels, format="rgb48le")
