"""Elementary functions to float32's accuracy, where Triton's own round once more on the way."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.44269504)
# ln 2 in two parts, the first of 16 bits: its products with exponents are exact
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.42860677e-6)
# added and taken away, it leaves the nearest whole number
ROUND = tl.constexpr(12582912.0)


@triton.jit
def exp(b_x):
    """e^x for x <= 0, to 3e-7; 0 from -150 on.

    e^x = 2^n 2^(r log2 e) with n whole and |r| < 0.35. tl.exp rounds x log2 e instead, an error of |x| 2^-24.
    """
    b_x = tl.where(b_x < -150.0, -150.0, b_x)
    b_whole = (b_x * LOG2_E + ROUND) - ROUND
    b_r = (b_x - b_whole * LN2_HIGH) - b_whole * LN2_LOW
    # a power in two steps passes through the subnormals
    b_n = b_whole.to(tl.int32)
    b_half = b_n >> 1
    b_first = ((b_half + 127) << 23).to(tl.float32, bitcast=True)
    b_second = ((b_n - b_half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.exp2(b_r * LOG2_E) * b_first * b_second


@triton.jit
def sigmoid(b_x, EXACT: tl.constexpr):
    """1 / (1 + e^-x), from e^-|x|, which cannot overflow; EXACT: to float32's accuracy, not to a 16-bit type's."""
    if EXACT:
        b_e = exp(-tl.abs(b_x))
        b_s = tl.div_rn(tl.where(b_x < 0, b_e, 1.0), 1.0 + b_e)
    else:
        b_e = tl.exp(-tl.abs(b_x))
        b_s = tl.where(b_x < 0, b_e, 1.0) / (1.0 + b_e)
    return b_s
