"""The names of transformers that have changed or may change: the one module that asks for them.

Everything else takes them from here, so that a rename is mended in one place. transformers is
imported when a function is called, never with this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

# How a forward's argument and a field of its output name the cache of keys and values, the newest
# spelling first: `cache` since 5.24.
CACHES = ("cache", "past_key_values")
# Memories of earlier tokens that are no cache of keys and values (Mamba, XLNet, Reformer, RWKV).
MEMORIES = ("cache_params", "mems", "past_buckets_states", "state")
# Arguments of continuous batching that hand attention a paged cache.
PAGED = ("cache", "block_table")

# In source: the registry that a module's forward takes its attention function from, the function
# of its own file, and where it reads which one to take.
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"
IMPLEMENTATION = "_attn_implementation"


def cache_argument(accepts: Mapping[str, inspect.Parameter]) -> str | None:
    """The name by which a forward takes its cache of keys and values; None if it has none known.

    Args:
        accepts: the parameters of the forward, as of `inspect.signature`.
    """
    for name in CACHES:
        # XLM's argument of that name is a dict of its own
        if name in accepts and "dict" not in str(accepts[name].annotation).lower():
            return name
    return None


def memory_argument(accepts: Mapping[str, inspect.Parameter]) -> str | None:
    """The name of a memory that is no cache of keys and values; None if a forward has none."""
    known = cache_argument(accepts)
    others = (name for name in (*MEMORIES, *CACHES) if name in accepts and name != known)
    return next(others, None)


def cache_of(output: Any) -> Any:
    """The cache of keys and values in what a model returned; None if there is none."""
    for name in CACHES:
        found = getattr(output, name, None)
        if found is not None:
            return found
    return None


def holds_cache(output: Any) -> bool:
    """Whether a cache of transformers is anywhere in what a model returned, by whatever name."""
    from transformers import Cache, EncoderDecoderCache

    fields = output.values() if hasattr(output, "values") else output
    return isinstance(fields, Iterable) and any(
        isinstance(field, (Cache, EncoderDecoderCache)) for field in fields
    )


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument of a model's forward, which `generate` takes too.

    Raises:
        ValueError: the model takes none by a name that is known.
    """
    name = cache_argument(inspect.signature(type(model).forward).parameters)
    if name is None:
        raise ValueError(
            f"{type(model).__name__}.forward takes no cache by a name that is known "
            f"({', '.join(CACHES)})."
        )
    return {name: cache}


def implementation_of(config: Any) -> Any:
    """The attention implementation that a config names; None if it names none."""
    return getattr(config, IMPLEMENTATION, None)


def has_implementation(config: Any) -> bool:
    """Whether a config has the field, set or not."""
    return hasattr(config, IMPLEMENTATION)


def set_implementation(config: Any, implementation: str | None) -> None:
    """Write the attention implementation into this config alone, not into the ones below it."""
    setattr(config, f"{IMPLEMENTATION}_internal", implementation)


def default_implementation(model: Any) -> Any:
    """The attention implementation that a transformers model takes if none is asked for."""
    return model.get_correct_attn_implementation(None, is_init_check=True)


def register(
    attention: Callable[..., Any], mask_functions: Mapping[str, Callable[..., Any]]
) -> None:
    """Give transformers an attention function under several keys, each with its mask function.

    Keys that are taken stay as they are.

    Raises:
        ImportError: transformers is missing or older than 4.56.
    """
    interface, masks = _interfaces()
    for key, mask_function in mask_functions.items():
        if key not in interface._global_mapping:
            interface.register(key, attention)
        if key not in masks._global_mapping:
            masks.register(key, mask_function)


def unwrap(model: Any) -> Any:
    """The model inside wrappers such as DistributedDataParallel."""
    from transformers.modeling_utils import unwrap_model

    return unwrap_model(model)


def attention_functions() -> Mapping[str, Callable[..., Any]]:
    """Attention functions by the name of the implementation, "eager" not among them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def mask_functions() -> Mapping[str, Callable[..., Any]]:
    """Mask functions by the name of the implementation."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS


def registered_masks() -> dict[str, Callable[..., Any]]:
    """The dict in which transformers looks mask functions up, for tests that plant others."""
    return _interfaces()[1]._global_mapping


class Masking(NamedTuple):
    """The helpers that masks are made with, each None where this version has none.

    Attributes:
        sdpa, eager: make a mask, bool and additive, of what a model asks for.
        causal, bidirectional: mask functions of positions.
        both, packed, remapped, window, window_both_sides: make one of what they are given.
    """

    sdpa: Any
    eager: Any
    causal: Any
    both: Any
    bidirectional: Any
    packed: Any
    remapped: Any
    window: Any
    window_both_sides: Any


_NEEDED = ("sdpa_mask", "eager_mask", "causal_mask_function", "and_masks")
_HELPERS = (
    *_NEEDED,
    "bidirectional_mask_function",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
)
_TOO_OLD = "patching models needs transformers >= 4.56; pip install 'attnvariants[hf]'."
# Not a cached function, which torch.compile would trace anew.
_masking: Masking | None = None


def masking() -> Masking:
    """The mask helpers of the installed transformers.

    Raises:
        ImportError: transformers is missing, older than 4.56, or has none by a known name.
    """
    global _masking
    if _masking is not None:
        return _masking
    try:
        from transformers import masking_utils
    except ImportError as error:
        raise ImportError(_TOO_OLD) from error
    lacking = [name for name in _NEEDED if not hasattr(masking_utils, name)]
    if lacking:
        import transformers

        raise ImportError(
            f"transformers {transformers.__version__} has no {', '.join(lacking)} in its "
            "masking_utils, which attnvariants makes masks with; install a version that "
            "docs/compatibility.md names."
        )
    _masking = Masking(*(getattr(masking_utils, name, None) for name in _HELPERS))
    return _masking


def masks_know_offsets() -> bool:
    """Whether mask functions are told where queries begin, as lazy masks need (5.5)."""
    return "q_offset" in inspect.signature(masking().sdpa).parameters


def caches_know_query_lengths() -> bool:
    """Whether caches tell mask sizes by the number of queries (5.5)."""
    from transformers.cache_utils import CacheLayerMixin

    return "query_length" in inspect.signature(CacheLayerMixin.get_mask_sizes).parameters


def output_collector() -> ContextVar[Any] | None:
    """Where transformers >= 5 keeps what the running call is asked to return; None before."""
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return None
    return getattr(output_capturing, "_active_collector", None)


def parallel_styles() -> list[str]:
    """Names of the styles of tensor parallelism; empty if this version has none."""
    try:
        from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
    except ImportError:
        return []
    return list(ALL_PARALLEL_STYLES)


def _interfaces() -> tuple[Any, Any]:
    """The two registries: of attention functions, and of their mask functions."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(_TOO_OLD) from error
    return AttentionInterface, type(ALL_MASK_ATTENTION_FUNCTIONS)
