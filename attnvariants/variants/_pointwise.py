"""Kernel hooks of pointwise functions divided by a power of the length."""

from attnvariants_kernels import functions as fn
from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.hooks import Hooks, no_delta, no_stats, no_sweep


@jit
def _size(n, theta):
    """The length: fixed, or where that is 0 the number of visible keys."""
    return tl.where(theta[0] > 0, theta[0], n)


@jit
def _reciprocal(n, theta):
    return 1.0 / _size(n, theta)


@jit
def finish_linear(stats, unit, n, theta):
    """Of weights in units of x, power 1."""
    factor = stats[0] * 0.0 + _reciprocal(n, theta)
    return factor * unit, (factor,)


@jit
def finish_linear_power(stats, unit, n, theta):
    """Of weights in units of x."""
    factor = stats[0] * 0.0 + tl.exp2(-theta[1] * tl.log2(_size(n, theta)))
    return factor * unit, (factor,)


@jit
def finish(stats, unit, n, theta):
    """Of weights in units of s, power 1."""
    factor = stats[0] * 0.0 + _reciprocal(n, theta)
    return factor, (factor,)


@jit
def finish_power(stats, unit, n, theta):
    """Of weights in units of s."""
    factor = stats[0] * 0.0 + tl.exp2(-theta[1] * tl.log2(_size(n, theta)))
    return factor, (factor,)


@jit
def _relu(x):
    # NaN stays NaN: it is not for a kernel to hide
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def fold_relu(stats, x, unit, keep, cols, n, theta):
    return stats, _relu(x), 1.0


@jit
def grad_relu(x, unit, cols, dp, saved, delta, n, theta):
    return _relu(x) * (unit * saved[0]), tl.where(x > 0, dp * saved[0], 0.0)


@jit
def fold_relu2(stats, x, unit, keep, cols, n, theta):
    s = _relu(x * unit)
    return stats, s * s, 1.0


@jit
def grad_relu2(x, unit, cols, dp, saved, delta, n, theta):
    s = _relu(x * unit)
    return s * s * saved[0], 2.0 * s * (dp * saved[0])


@jit
def _relu6(s):
    return tl.minimum(_relu(s), 6.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def fold_relu6(stats, x, unit, keep, cols, n, theta):
    return stats, _relu6(x * unit), 1.0


@jit
def grad_relu6(x, unit, cols, dp, saved, delta, n, theta):
    s = x * unit
    inside = (s > 0) & (s < 6)
    return _relu6(s) * saved[0], tl.where(inside, dp * saved[0], 0.0)


@jit
def _softplus(s):
    return tl.maximum(s, 0.0) + fn.log2_1p(tl.exp2(tl.abs(s) * -fn.LOG2E)) * fn.LN2


@jit
def fold_softplus(stats, x, unit, keep, cols, n, theta):
    return stats, _softplus(x * unit), 1.0


@jit
def grad_softplus(x, unit, cols, dp, saved, delta, n, theta):
    s = x * unit
    return _softplus(s) * saved[0], fn.sigmoid(s) * (dp * saved[0])


@jit
def fold_sigmoid(stats, x, unit, keep, cols, n, theta):
    return stats, fn.sigmoid(x * unit), 1.0


@jit
def grad_sigmoid(x, unit, cols, dp, saved, delta, n, theta):
    w = fn.sigmoid(x * unit)
    # 1 - w would cancel where w is near 1
    return w * saved[0], w * fn.sigmoid(-x * unit) * (dp * saved[0])


@jit
def fold_silu(stats, x, unit, keep, cols, n, theta):
    s = x * unit
    return stats, s * fn.sigmoid(s), 1.0


@jit
def grad_silu(x, unit, cols, dp, saved, delta, n, theta):
    s = x * unit
    w = fn.sigmoid(s)
    return s * w * saved[0], w * (1.0 + s * (1.0 - w)) * (dp * saved[0])


@jit
def _normal_cdf(s):
    return 0.5 * (1.0 + tl.erf(s * 0.7071067811865476))


@jit
def fold_gelu(stats, x, unit, keep, cols, n, theta):
    s = x * unit
    return stats, s * _normal_cdf(s), 1.0


@jit
def grad_gelu(x, unit, cols, dp, saved, delta, n, theta):
    s = x * unit
    cdf = _normal_cdf(s)
    density = 0.3989422804014327 * tl.exp2(s * s * (-0.5 * fn.LOG2E))
    return s * cdf * saved[0], (cdf + s * density) * (dp * saved[0])


@jit
def fold_identity(stats, x, unit, keep, cols, n, theta):
    return stats, x, 1.0


@jit
def grad_identity(x, unit, cols, dp, saved, delta, n, theta):
    return x * (unit * saved[0]), dp * saved[0]


# activation: (fold, grad, weights in units of x, x of a hidden key, 0 there by itself)
_ACTIVATIONS = {
    "relu": (fold_relu, grad_relu, True, 0.0, True),
    "relu2": (fold_relu2, grad_relu2, False, 0.0, True),
    "relu6": (fold_relu6, grad_relu6, False, 0.0, True),
    "softplus": (fold_softplus, grad_softplus, False, float("-inf"), True),
    "sigmoid": (fold_sigmoid, grad_sigmoid, False, float("-inf"), True),
    "gelu": (fold_gelu, grad_gelu, False, 0.0, False),
    "silu": (fold_silu, grad_silu, False, 0.0, False),
    "identity": (fold_identity, grad_identity, True, 0.0, False),
}
_FINISH = {
    (True, True): finish_linear,
    (True, False): finish_linear_power,
    (False, True): finish,
    (False, False): finish_power,
}


def hooks(options, case):
    """The hooks of `act`, `length` and `power`."""
    fold, grad, linear, hidden, hides = _ACTIVATIONS[options["act"]]
    end = _FINISH[linear, options["power"] == 1]
    cheap = options["act"] in ("relu", "relu2", "relu6", "identity")
    return Hooks(
        no_stats, no_sweep, fold, end, grad, no_delta, hidden=hidden, rescales=False,
        needs_n=options["length"] == "visible", needs_delta=False, hides=hides,
        scaled=True, cost=int(not cheap),
    )  # fmt: skip
