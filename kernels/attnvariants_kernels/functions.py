"""Elementwise functions for hooks: accurate where the hardware's own are not."""

from __future__ import annotations

from attnvariants_kernels._triton import INTERPRETED, is_cuda, jit, tl

# Under every score that counts, and finite: (-inf) - LOWEST is -inf, not NaN.
LOWEST = tl.constexpr(-3.0e38)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below this, log2(1 + 2^z) is 2^z log2 e to half a unit of float32.
_TAIL = tl.constexpr(-20.0)
_HARDWARE = tl.constexpr(not INTERPRETED)


@jit
def log2_approx(x):
    """log2 by the hardware: 2^-22 off in absolute terms where x is in (0.5, 2)."""
    if _HARDWARE and is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@jit
def product(x, y):
    """x y, rounded before anything is added to it: what its own rounding is taken off is 0."""
    if _HARDWARE and is_cuda():
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return x * y


@jit
def expm1(x):
    """e^x - 1 to float32 rounding, x <= 88."""
    y = 1.0 / 40320 * x + 1.0 / 5040
    y = y * x + 1.0 / 720
    y = y * x + 1.0 / 120
    y = y * x + 1.0 / 24
    y = y * x + 1.0 / 6
    y = y * x + 0.5
    y = y * x * x + x
    return tl.where(tl.abs(x) < 0.5, y, tl.exp2(x * LOG2E) - 1.0)


@jit
def log2_1p(t):
    """log2(1 + t) to float32 rounding, t >= 0."""
    z = t / (2.0 + t)
    z2 = z * z
    y = z2 * (1.0 / 9) + 1.0 / 7
    y = y * z2 + 1.0 / 5
    y = y * z2 + 1.0 / 3
    y = (y * z2 * z + z) * (2.0 * LOG2E)
    return tl.where(t < 0.25, y, tl.log2(1.0 + t))


@jit
def tanh(x):
    """tanh to float32 rounding; the hardware's is good to 11 bits."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    y = (1.0 - e) / (1.0 + e)
    x2 = x * x
    small = ((-17.0 / 315 * x2 + 2.0 / 15) * x2 - 1.0 / 3) * x2 * x + x
    return tl.where(tl.abs(x) < 0.1, small, tl.where(x < 0, -y, y))


@jit
def softplus2(z, pivot, past):
    """log2(1 + 2^z) 2^-pivot to float32 rounding, for any pivot >= z - 120 or so.

    `past` is z - pivot, which the caller can have with more digits.
    """
    body = tl.maximum(z, 0.0) + log2_1p(tl.exp2(-tl.abs(z)))
    return tl.where(z < _TAIL, tl.exp2(past) * LOG2E, body * tl.exp2(-pivot))


@jit
def softplus2_half(z):
    """log2(1 + 2^z), z <= 120, to half precision's rounding."""
    t = tl.exp2(z)
    return tl.where(z < -10.5, t * LOG2E, log2_approx(1.0 + t))


@jit
def sigmoid2(z, pivot, past):
    """2^-pivot / (1 + 2^-z), likewise."""
    e = tl.exp2(-tl.abs(z))
    body = tl.where(z >= 0, 1.0, e) / (1.0 + e)
    return tl.where(z < _TAIL, tl.exp2(past), body * tl.exp2(-pivot))


@jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
