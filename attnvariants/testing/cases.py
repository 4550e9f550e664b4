"""Random calls as dictionaries of JSON, and what they stand for.

A case holds only what differs from `DEFAULTS`, so that it prints as one short line and shrinks
field by field; `build` makes the call of it, the same each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from attnvariants.api import attention
from attnvariants.registry import Option, Variant, get_variant, list_variants
from attnvariants.testing.judge import Call
from attnvariants.varlen import attention_varlen

Case = dict[str, Any]

DEFAULTS: Case = {
    "variant": "softmax",
    "options": {},
    "impl": "chunked",
    "dtype": "float32",
    "batch": 1,
    "heads": 1,
    "kv_heads": 1,
    "q_len": 3,
    "kv_len": 3,
    "dim": 4,
    "value_dim": 4,
    # magnitudes of query, key, value and the output's gradient
    "sizes": [1.0, 1.0, 1.0, 1.0],
    "causal": False,
    "window": None,
    "mask": None,
    "bias": None,
    "alibi": None,
    "softcap": None,
    "scale": None,
    "dropout": 0.0,
    "layout": None,
    # lengths of packed sequences' queries and keys
    "packed": None,
    # what is odd about the numbers
    "special": None,
    # rows and scores of the chunked engine's blocks
    "blocks": None,
    "seed": 0,
}
MASKS = (
    "full", "heads", "rows", "left_padding", "right_padding", "empty_rows", "nothing", "float",
    "float_finite",
)  # fmt: skip
BIASES = ("full", "keys", "rows", "offset", "hides")
LAYOUTS = ("transposed", "strided", "sliced", "reversed")
SPECIALS = ("zero_rows", "equal_keys", "common_part", "one_large_row", "sparse")
_RANGES = {"float16": (-7.0, 4.0), "bfloat16": (-20.0, 30.0), "float32": (-20.0, 30.0)}


def draw(seed: int, index: int, impl: str = "chunked") -> Case:
    """The case of that number: any variant with a mix of the contract's features."""
    rng = Random(f"{seed}:{index}")
    full = dict(DEFAULTS, impl=impl, seed=rng.randrange(2**20))
    full["variant"] = rng.choice(list_variants())
    if impl == "sdpa":
        full["variant"] = rng.choice(
            [name for name in list_variants() if get_variant(name).softmax_scores]
        )
    variant = get_variant(full["variant"])
    dtypes = ["float32"] * 3 + ["float16", "bfloat16"] + ["float64"] * (impl != "triton")
    full["dtype"] = rng.choice(dtypes)
    _draw_sizes(rng, full)
    _draw_geometry(rng, full)
    _draw_scores(rng, full, variant)
    if rng.random() < 0.5:
        full["options"] = {
            name: _draw_option(rng, option, full)
            for name, option in variant.options.items()
            if rng.random() < 0.6
        }
    if impl != "sdpa" and rng.random() < 0.12:
        full["dropout"] = rng.choice([0.1, 0.5, 0.9, 1.0])
    if rng.random() < 0.25:
        full["layout"] = rng.choice(LAYOUTS)
    if rng.random() < 0.3:
        full["special"] = rng.choice(SPECIALS)
    if impl == "chunked" and rng.random() < 0.5:
        full["blocks"] = [rng.choice([1, 2, 16]), rng.choice([16, 64])]
    return shorten(full)


def _draw_sizes(rng: Random, full: Case) -> None:
    full["batch"] = rng.choice([1, 1, 2, 3])
    full["kv_heads"] = rng.choice([1, 1, 2, 3])
    full["heads"] = full["kv_heads"] * rng.choice([1, 1, 2, 3])
    full["dim"] = rng.choice([1, 2, 4, 7, 8, 16, 20])
    full["value_dim"] = rng.choice([full["dim"], full["dim"], 1, 3, 8])
    lengths = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, *([33, 70] if rng.random() < 0.15 else [])]
    full["kv_len"] = rng.choice(lengths)
    full["q_len"] = rng.choice([full["kv_len"], full["kv_len"], 1, rng.choice(lengths)])
    if rng.random() < 0.3:
        exponents = _RANGES.get(full["dtype"], (-20.0, 30.0))
        wide = rng.random() < 0.5
        low, high = exponents if wide else (max(exponents[0], -3.0), min(exponents[1], 3.0))
        full["sizes"] = [
            float(f"{10 ** rng.uniform(low, high):.0e}") if rng.random() < 0.6 else 1.0
            for _ in range(3)
        ] + [rng.choice([1.0, 1.0, 1e-4, 1e3])]


def _draw_geometry(rng: Random, full: Case) -> None:
    full["causal"] = rng.random() < 0.5
    if rng.random() < 0.3:
        full["window"] = [rng.choice([-1, 0, 1, 2, 5]), rng.choice([-1, 0, 1, 3])]
    if rng.random() < 0.12:
        lengths = [0, 1, 2, 3, 5, 9]
        count = rng.choice([1, 2, 3, 4])
        full["packed"] = [[rng.choice(lengths), rng.choice(lengths)] for _ in range(count)]
        full["batch"] = 1
    elif rng.random() < 0.4:
        full["mask"] = rng.choice(MASKS)


def _draw_scores(rng: Random, full: Case, variant: Variant) -> None:
    refuses = variant.refuses
    if "bias" in refuses and full["mask"] in ("float_finite",):
        full["mask"] = "float"
    if "bias" not in refuses and full["packed"] is None and rng.random() < 0.25:
        full["bias"] = rng.choice(BIASES)
    if "alibi_slopes" not in refuses and rng.random() < 0.2:
        full["alibi"] = rng.choice(["heads", "batch"])
    if "softcap" not in refuses and full["impl"] != "sdpa" and rng.random() < 0.2:
        full["softcap"] = rng.choice([0.5, 2.0, 30.0])
    if rng.random() < 0.2:
        full["scale"] = rng.choice([0.25, 1.0, 3.0, 0.0])
        if variant.check is None and rng.random() < 0.3:
            full["scale"] = -0.5


def _draw_option(rng: Random, option: Option, full: Case) -> Any:
    """A value that the option accepts; learned tensors are the string of their shape."""
    if option.learned and rng.random() < 0.5:
        return rng.choice(["heads", "scalar"])
    if option.choices and (not option.number or rng.random() < 0.7):
        return rng.choice(option.choices)
    default = option.default
    if default is None:
        return max(full["q_len"], full["kv_len"], 1, *_lengths(full)) + rng.randrange(9)
    if isinstance(default, (bool, str)):
        default = 8
    value = (abs(default) or 1.0) * 2 ** rng.uniform(-3, 3)
    if isinstance(default, int) or rng.random() < 0.4:
        value = float(round(value)) or 1.0
    least = option.minimum if option.minimum is not None else option.above
    value = value if least is None else max(value, least + (option.above is not None) * 0.1)
    return int(value) if isinstance(default, int) else float(f"{value:.3g}")


def _lengths(full: Case) -> list[int]:
    return [length for pair in full["packed"] or [] for length in pair]


def shorten(full: Mapping[str, Any]) -> Case:
    """The case without what is as in `DEFAULTS`."""
    return {key: value for key, value in full.items() if value != DEFAULTS[key]}


def complete(case: Mapping[str, Any]) -> Case:
    """The case with what is as in `DEFAULTS`.

    Raises:
        ValueError: a field that no case has.
    """
    unknown = [key for key in case if key not in DEFAULTS]
    if unknown:
        raise ValueError(f"a case has the fields {', '.join(DEFAULTS)}; got {unknown[0]!r}.")
    return {**DEFAULTS, **case}


class _Numbers:
    """Standard normal float64 numbers that a dtype holds, one stream a case."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * size
        largest = torch.finfo(self.dtype).max
        return self.held(drawn.clamp(-largest / 4, largest / 4))

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).double()

    def likely(self, *shape: int, share: float = 0.6) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share


def build(case: Mapping[str, Any]) -> Call:
    """The call that a case stands for."""
    full = complete(case)
    dtype = getattr(torch, full["dtype"])
    numbers = _Numbers(full["seed"], dtype)
    batch, heads, kv_heads = full["batch"], full["heads"], full["kv_heads"]
    q_len, kv_len = full["q_len"], full["kv_len"]
    if full["packed"] is not None:
        q_len, kv_len = (sum(pair[i] for pair in full["packed"]) for i in (0, 1))
    q_size, k_size, v_size, grad_size = full["sizes"]
    leaves = {
        "query": numbers.normal(batch, heads, q_len, full["dim"], size=q_size),
        "key": numbers.normal(batch, kv_heads, kv_len, full["dim"], size=k_size),
        "value": numbers.normal(batch, kv_heads, kv_len, full["value_dim"], size=v_size),
    }
    _make_special(full["special"], leaves, numbers)
    cotangent = numbers.normal(batch, heads, q_len, full["value_dim"], size=grad_size)
    rest: dict[str, Any] = {"causal": full["causal"]}
    for name in ("softcap", "scale"):
        if full[name] is not None:
            rest[name] = full[name]
    if full["window"] is not None:
        rest["window_size"] = tuple(full["window"])
    if full["dropout"]:
        rest["dropout_p"] = full["dropout"]
    if full["mask"] is not None:
        rest["attn_mask"] = _mask(full["mask"], numbers, batch, heads, q_len, kv_len)
    if full["bias"] is not None:
        leaves["bias"] = _bias(full["bias"], numbers, batch, heads, q_len, kv_len)
    if full["alibi"] is not None:
        several = batch if full["packed"] is None else len(full["packed"])
        shape = (heads,) if full["alibi"] == "heads" else (several, heads)
        leaves["alibi_slopes"] = numbers.normal(*shape).abs()
    for name, value in full["options"].items():
        if value in ("heads", "scalar"):
            size = [heads] if value == "heads" else []
            leaves[name] = numbers.held(numbers.normal(*size) * 0.3 + 0.7)
        else:
            rest[name] = value
    function: Callable[..., Tensor] = attention
    if full["packed"] is not None:
        rest["lengths"] = full["packed"]
        function = _packed
        for name in ("query", "key", "value"):
            leaves[name] = leaves[name][0].transpose(0, 1)
        cotangent = cotangent[0].transpose(0, 1)
    if full["layout"] is not None:
        function = _Laid(full["layout"], function)
    return Call(full["variant"], leaves, rest, cotangent, full["seed"], function)


def _make_special(special: str | None, leaves: dict[str, Tensor], numbers: _Numbers) -> None:
    query, key = leaves["query"], leaves["key"]
    if special == "zero_rows":
        query.mul_(numbers.likely(*query.shape[:-1], 1))
        key.mul_(numbers.likely(*key.shape[:-1], 1))
    elif special == "equal_keys" and key.shape[2]:
        key.copy_(key[:, :, torch.arange(key.shape[2]) // 2].clone())
    elif special == "common_part":
        # scores with an offset of the row's
        largest = query.abs().max() if query.numel() else 0.0
        query[..., 0] += 30.0 * largest
        leaves["query"] = numbers.held(query)
        key[..., 0] = key[..., :1].abs().mean() if key.numel() else 0.0
        leaves["key"] = numbers.held(key)
    elif special == "one_large_row" and key.shape[2]:
        key[:, :, -1] *= 50.0
        leaves["key"] = numbers.held(key)
    elif special == "sparse":
        leaves["value"].mul_(numbers.likely(*leaves["value"].shape, share=0.3))
    limit = torch.finfo(numbers.dtype).max / 4
    for name in ("query", "key"):
        leaves[name] = leaves[name].clamp(-limit, limit)


def _mask(kind: str, numbers: _Numbers, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    if kind in ("left_padding", "right_padding"):
        length = torch.randint(0, kv_len + 1, (batch, 1, 1, 1), generator=numbers.generator)
        place = torch.arange(kv_len)
        return place >= length if kind == "left_padding" else place < length
    shape = {
        "heads": (1, heads, 1, kv_len),
        "rows": (q_len, kv_len),
        "empty_rows": (batch, 1, q_len, kv_len),
        "nothing": (batch, 1, 1, kv_len),
    }.get(kind, (batch, heads, q_len, kv_len))
    if kind == "nothing":
        return torch.zeros(shape, dtype=torch.bool)
    keep = numbers.likely(*shape)
    if kind == "empty_rows":
        keep &= numbers.likely(*shape[:-1], 1)
    if kind not in ("float", "float_finite"):
        return keep
    added = numbers.normal(*shape) if kind == "float_finite" else torch.zeros(shape).double()
    return added.masked_fill(~keep, -math.inf)


def _bias(kind: str, numbers: _Numbers, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    shape = {"keys": (1, heads, 1, kv_len), "rows": (q_len, kv_len)}.get(
        kind, (batch, heads, q_len, kv_len)
    )
    bias = numbers.normal(*shape)
    if kind == "offset":
        bias = numbers.held(bias - 3e4)
    if kind == "hides":
        bias = bias.masked_fill(~numbers.likely(*shape, share=0.8), -math.inf)
    return bias


def _packed(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[list[int]],
    impl: str,
    alibi_slopes: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """Packed sequences; the reference takes one after another by itself."""
    bounds = [[0], [0]]
    for pair in lengths:
        for side, length in zip(bounds, pair, strict=True):
            side.append(side[-1] + length)
    if impl != "reference":
        cu_q, cu_k = (torch.tensor(side, dtype=torch.int32) for side in bounds)
        return attention_varlen(
            query, key, value, cu_q, cu_k, impl=impl, alibi_slopes=alibi_slopes, **rest
        )
    outs = []
    for i in range(len(lengths)):
        rows, cols = (slice(side[i], side[i + 1]) for side in bounds)
        slopes = alibi_slopes
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            slopes = alibi_slopes[i]
        q, k, v = (x.transpose(0, 1)[None] for x in (query[rows], key[cols], value[cols]))
        out = attention(q, k, v, impl=impl, alibi_slopes=slopes, **rest)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


class _Laid:
    """A function of query, key and value that come in an odd layout."""

    def __init__(self, layout: str, function: Callable[..., Tensor]):
        self.layout, self.function = layout, function

    def __call__(self, *, impl: str, **call: Any) -> Tensor:
        """The result of the function."""
        if impl != "reference":
            for name in ("query", "key", "value"):
                call[name] = self.lay(call[name])
        return self.function(impl=impl, **call)

    def lay(self, tensor: Tensor) -> Tensor:
        """The same numbers in the layout."""
        if self.layout == "transposed":
            return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)
        if self.layout == "strided":
            return torch.stack([tensor, tensor.detach() * 0 + 7], -1).flatten(-2)[..., ::2]
        if self.layout == "sliced":
            return torch.nn.functional.pad(tensor, (3, 2, 1, 1), value=7.0)[..., 1:-1, 3:-2]
        # dimensions in the opposite order of memory
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
