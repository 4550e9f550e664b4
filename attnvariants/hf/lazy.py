"""A mask that is a description until somebody reads it as a tensor.

transformers builds attention masks of tokens x tokens before it calls attention. What it would put
into most of them (causality, a window, padding, packed documents) attention takes as arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map

from attnvariants.context import exported, readable
from attnvariants.hf.names import masking
from attnvariants.hf.patterns import Pattern, boundaries, pattern_of

_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "bool", "iter"),
    *("and", "rand", "or", "ror", "xor", "rxor", "invert", "eq", "ne", "lt", "le", "gt", "ge"),
)


class View(NamedTuple):
    """A mask as arguments of `attention`.

    Attributes:
        keys: only the first `keys` keys can be seen; the others must be cut off.
        causal, window: as `attention` takes them.
        keep: `[batch, 1, 1, keys]` bool, False at padding; None without any.
        documents: boundaries of queries and keys, int, where the rows of the batch one after
            another hold several documents.
        read: whether `keep` was made by others, so that its tail may hide unused keys.
        bias: what a mask made by others adds to the scores and has a gradient.
    """

    keys: int
    causal: bool
    window: tuple[int, int] | None
    keep: Tensor | None
    documents: tuple[Tensor, Tensor] | None = None
    read: bool = False
    bias: Tensor | None = None


class LazyMask(BlockMask):
    """A mask `[batch, 1, q_len, kv_len]`, built when it is read.

    It is a `BlockMask` because transformers takes those for masks that are ready. Any tensor
    attribute, method, operator or torch function reads it.

    Args:
        request: what transformers asked for, as arguments of its `sdpa_mask`.
        pattern: what the mask function among them means.
        form: "bool" (True = visible) or "float" (added to scores), what reading gives.
    """

    def __init__(self, request: dict[str, Any], pattern: Pattern, form: str):
        self.request = request
        self.pattern = pattern
        self.form = form
        self.batch: int = request["batch_size"]
        self.q_len: int = request["q_length"]
        self.kv_len: int = request["kv_length"]
        self._built: dict[Any, Any] = {}

    @property
    def shape(self) -> torch.Size:
        """`[batch, 1, q_len, kv_len]`."""
        return torch.Size((self.batch, 1, self.q_len, self.kv_len))

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def dim(self) -> int:
        """4."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As a tensor's."""
        return self.batch * self.q_len * self.kv_len

    def __len__(self) -> int:
        return self.batch

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that reading gives."""
        return torch.bool if self.form == "bool" else self.request["dtype"]

    @property
    def device(self) -> torch.device:
        """Of the tensor that reading gives."""
        return torch.device(self.request["device"])

    def contiguous(self, *args: Any, **kwargs: Any) -> LazyMask:
        """Itself."""
        return self

    clone = detach = contiguous

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself on another device; the tensor if anything else is asked for."""
        device = kwargs.get("device", args[0] if args else None)
        others = set(kwargs) - {"device", "non_blocking"} or len(args) > 1
        if others or not isinstance(device, (str, int, torch.device)):
            return self.tensor().to(*args, **kwargs)
        device = torch.device(device)
        if device == self.device:
            return self
        if self.pattern.documents is not None:
            # its mask function holds tensors of this device
            return self.tensor().to(device)
        key = "on", device
        if key not in self._built:
            moved = copy.copy(self)
            padding = self.request["attention_mask"]
            padding = None if padding is None else padding.to(device)
            moved.request = {**self.request, "attention_mask": padding, "device": device}
            moved._built = {}
            self._built[key] = moved
        return self._built[key]

    def tensor(self, form: str | None = None) -> Tensor:
        """The whole mask as a tensor, in its own form or another one."""
        form = self.form if form is None else form
        if form not in self._built:
            self._built[form] = build_tensor(self.request, form)
        return self._built[form]

    def as_asked(self, form: str) -> Tensor | None:
        """What transformers' own mask function of that form returns; None where it leaves one out.

        That is what an operator of transformers expects which runs beside a variant.
        """
        key = "asked", form
        if key not in self._built:
            function = masking().sdpa if form == "bool" else masking().eager
            self._built[key] = function(**self.request)
        return self._built[key]

    def view(self, q_len: int, kv_len: int) -> View | None:
        """The mask as arguments of `attention`; None if they cannot say it.

        Args:
            q_len: number of queries that it is for.
            kv_len: number of keys; fewer than the mask's cut it off.
        """
        if q_len != self.q_len or kv_len > self.kv_len:
            return None
        pattern = self.pattern
        documents = None
        if pattern.documents is not None:
            documents = self._documents()
            if documents is None or q_len != kv_len:
                return None
        shift = self.request["q_offset"] - self.request["kv_offset"]
        keys, left, right = kv_len, pattern.left, pattern.right
        if left is not None or right is not None:
            # attention aligns the last query with the last key
            if right == 0 and kv_len > shift + q_len > 0:
                keys = shift + q_len
            if shift < 0 or keys != shift + q_len:
                return None
        if left is not None and left >= keys - 1:
            left = None
        if right is not None and (right >= keys - 1 or q_len == 1):
            right = None
        window = None
        if left is not None or right:
            window = -1 if left is None else left, -1 if right is None else right
        return View(keys, right == 0, window, self._keep(keys), documents)

    def _documents(self) -> tuple[Tensor, Tensor] | None:
        ids = self.pattern.documents
        if ids is None or ids.shape != (self.batch, self.q_len) or not readable(ids):
            return None
        if "documents" not in self._built:
            bounds = None if self.request["attention_mask"] is not None else boundaries(ids)
            self._built["documents"] = bounds
        bounds = self._built["documents"]
        return None if bounds is None else (bounds, bounds)

    def _keep(self, keys: int) -> Tensor | None:
        if self.request["attention_mask"] is None:
            return None
        # a symbolic length of a call being compiled would be fixed by looking it up
        unread = not readable(self.request["attention_mask"])
        if unread or ("keep", keys) not in self._built:
            start = self.request["kv_offset"]
            keep = self.request["attention_mask"][: self.batch, start : start + keys]
            if keep.shape[1] < keys:
                keep = F.pad(keep, (0, keys - keep.shape[1]), value=False)
            if unread:
                return keep[:, None, None]
            self._built["keep", keys] = None if bool(keep.all()) else keep[:, None, None]
        return self._built["keep", keys]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getitem__(self, index: Any) -> Tensor:  # type: ignore[override]
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        # of what a tensor has, copying and pickling look for none of these
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"LazyMask(shape={list(self.shape)}, {self.pattern})"

    __str__ = __repr__


def _operator(name: str) -> Callable[..., Any]:
    def method(self: LazyMask, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_read, others))

    return method


for _name in _OPERATORS:
    setattr(LazyMask, f"__{_name}__", _operator(f"__{_name}__"))


def describe(
    form: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> LazyMask | Tensor:
    """The mask that transformers asks for: described, or built where that is not certain.

    Args:
        form: "bool" or "float".
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, more:
            as transformers' `sdpa_mask` takes them.
    """
    function = masking().causal if mask_function is None else mask_function
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.bool()
    steps = isinstance(q_offset, Tensor)
    if steps:
        # a static cache changes it in place before attention runs
        q_offset = q_offset.clone()
    request = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": attention_mask,
        "device": "cpu",
        "dtype": torch.float32,
        **more,
    }
    pattern = None if more.get("use_vmap") else pattern_of(function)
    ready = attention_mask is None or attention_mask.dim() == 2
    # numbers that change with every step would compile the step anew
    static = steps or not (more.get("allow_is_causal_skip", True) or pattern == Pattern())
    if (
        pattern is None
        or not ready
        or not isinstance(kv_offset, int)
        or (q_length == 1 and static)
        or (steps and not readable(q_offset))
        or exported()
    ):
        return build_tensor(request, form)
    if steps:
        request["q_offset"] = int(q_offset)
    return LazyMask(request, pattern, form)


def build_tensor(request: dict[str, Any], form: str) -> Tensor:
    """The mask `[batch, 1, q_len, kv_len]`, never left out."""
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Any = masking().sdpa(**{**request, **skips})
    return mask if form == "bool" else to_float(mask, request["dtype"])


def to_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the additive one of eager attention."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def _read(value: Any) -> Any:
    return value.tensor() if isinstance(value, LazyMask) else value
