"""Inputs of any magnitude that a dtype holds, judged by float64 and by plain torch in that dtype.

`faults` runs one call, causal and with ordinary noise in every number, and lists what is wrong:

- a result that is not finite where the float64 reference is finite and the dtype can hold it, NaN
  even where it cannot;
- an error above twice that of the plain formula in the same dtype (`oracles`, whose every step
  rounds to it), and above what `attnvariants.testing.judge` explains by rounding;
- rows of weights that do not sum to one, of a variant whose do.
"""

import oracles
import torch

from attnvariants import attention, get_variant
from attnvariants.testing import judge

MAGNITUDES = (1e-20, 1e-10, 1e-5, 1e-3, 1.0, 1e3, 1e5, 1e10, 1e20, 1e30)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTS = ("relu", "relu2", "relu6", "softplus", "sigmoid", "gelu", "silu", "identity")
FORMS = [
    ("softmax", {}),
    ("ssmax", {"s": 0.7, "b": 0.3}),
    ("softpick", {}),
    ("lssa", {}),
    ("lssar", {}),
    ("lssar", {"p": 3.0, "offset": 0.5}),
    ("lssar", {"p": 2.5}),
    ("sa_softmax", {}),
    ("sa_softmax", {"form": "x"}),
    ("sa_softmax", {"detach_minmax": True}),
    ("sparsemax", {}),
    ("cosformer", {}),
    ("cosformer", {"max_len": 64}),
    *(("relu", {"act": act, "length": "visible"}) for act in ACTS),
    ("relu", {"act": "relu2", "length": 512}),
    ("relu", {"act": "relu2", "length": "kv", "power": 2.0}),
    ("relu", {"act": "softplus", "length": "kv", "power": 0.5}),
]
TOKENS, DIM = 9, 8


def identifier(form):
    name, options = form
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


def sizes(dtype):
    """Magnitudes of query, key and value that `dtype` holds."""
    limits = torch.finfo(dtype)
    least, most = limits.smallest_normal * limits.eps, limits.max / 8
    half = [1e-7, 1e-4, 1e-2, 3e2, 8e3] if dtype == torch.float16 else []
    held = sorted({m for m in (*MAGNITUDES, *half) if least <= m <= most})
    found = []
    for m in held:
        found += [(m, m, m), (m, m, 1.0), (m, 1.0, 1.0), (1.0, m, 1.0), (1.0, 1.0, m)]
        if least <= 1 / m <= most:
            found += [(m, 1 / m, 1.0), (1 / m, m, m)]
    return list(dict.fromkeys(found))


def numbers(shape, dtype, size, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (normal * size).to(dtype).double()


def call_of(name, options, dtype, size, seed=0, tokens=TOKENS, dim=DIM, **rest):
    """A causal call of 2 heads that share a key head, of query, key and value so large."""
    shapes = (1, 2, tokens, dim), (1, 1, tokens, dim), (1, 1, tokens, dim)
    leaves = {
        leaf: numbers(shape, dtype, of, 3 * seed + i)
        for i, (leaf, shape, of) in enumerate(
            zip(("query", "key", "value"), shapes, size, strict=True)
        )
    }
    cotangent = numbers(shapes[0], dtype, 1.0, 3 * seed + 99)
    return judge.Call(name, leaves, {"causal": True, **options, **rest}, cotangent)


def plain(call, dtype):
    """Output and gradients by the papers' formulas, every step in `dtype`."""
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in call.leaves.items()}
    rest = {name: item for name, item in call.rest.items() if name != "causal"}
    q, k = leaves["query"], leaves["key"]
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    keep = keep.expand(*q.shape[:3], k.shape[2])
    for name in ("bias", "alibi_slopes"):
        if name in rest:
            rest[name.removeprefix("alibi_")] = rest.pop(name).to(dtype)
    out = oracles.attention(**leaves, variant=call.variant, keep=keep, **rest)
    grads = torch.autograd.grad(
        out, list(leaves.values()), call.cotangent.to(dtype), allow_unused=True
    )
    grads = [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves.values(), grads, strict=True)
    ]
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def twice_plain(fault, found, wanted, plainly):
    """Whether an error is no more than twice the plain formula's."""
    got, want, other = (of[fault.tensor].double() for of in (found, wanted, plainly))
    known = want.isfinite() & got.isfinite()
    error = (got - want).abs().where(known, 0).max()
    plain_error = (other - want).abs().where(known, 0).nan_to_num(nan=0.0, posinf=0.0).max()
    return fault.what == "off" and bool(error <= 2 * plain_error)


def faults(name, options, impl, dtype, size, seed=0, unit=None, **rest):
    """What is wrong with an engine's results for inputs of these magnitudes, as sentences.

    Args:
        size: magnitudes of query, key and value.
        unit: a unit of rounding of the engine's arithmetic; None is float32's.
        rest: more arguments of the call.
    """
    call = call_of(name, options, dtype, size, seed, **rest)
    wanted = call.run("reference", torch.float64)
    found = call.run(impl, dtype)
    listed = judge.compare(found, wanted, dtype, call.again, unit)
    if listed:
        plainly = plain(call, dtype)
        listed = [each for each in listed if not twice_plain(each, found, wanted, plainly)]
    return [str(each) for each in listed] + row_sums(call, impl, dtype)


def row_sums(call, impl, dtype):
    """What is wrong with the sums of the rows of weights, of variants whose rows sum to one."""
    if get_variant(call.variant).row_sum != "one":
        return []
    inputs = {name: leaf.to(dtype) for name, leaf in call.leaves.items()}
    # values of one: the output is the sum of the weights
    inputs["value"] = torch.ones_like(inputs["value"])
    mass = attention(**inputs, variant=call.variant, impl=impl, **call.rest)
    worst = float((mass.double() - 1).abs().max())
    return [] if worst <= 2 * torch.finfo(dtype).eps + 2e-6 else [f"rows sum to 1 +- {worst:.1e}"]
