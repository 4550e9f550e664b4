"""The child module `attn_variant` of a patched attention module: its variant and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

CHILD = "attn_variant"


class Spec(NamedTuple):
    """What an attention module computes: arguments for `attention`."""

    variant: str
    impl: str
    options: dict[str, Any]


class AttnVariant(nn.Module):
    """Variant, options and learned parameters of one attention module.

    The parameters are read through `forward`, so that wrappers which act around it (PEFT's
    `modules_to_save`, accelerate's offloading, FSDP) see the read.
    """

    def __init__(
        self,
        variant: str,
        impl: str,
        options: Mapping[str, Any],
        learned: Mapping[str, Tensor],
        trainable: bool,
    ):
        super().__init__()
        self.variant = variant
        self.impl = impl
        self.options = dict(options)
        self.learned = tuple(learned)
        self.initial = {name: value.tolist() for name, value in learned.items()}
        for name, value in learned.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=trainable))

    def forward(self, query: Tensor | None = None) -> Spec:
        """The spec with the parameters as they are now; `query` is there for wrappers."""
        options = dict(self.options)
        for name in self.learned:
            options[name] = getattr(self, name)
        return Spec(self.variant, self.impl, options)

    def record(self) -> dict[str, Any]:
        """The spec as JSON-able values; learned options by name only."""
        return {
            "variant": self.variant,
            "impl": self.impl,
            "options": dict(self.options),
            "learned": list(self.learned),
        }

    def same_request(self, other: AttnVariant) -> bool:
        """Whether both were asked for with the same variant, options and initial values."""
        trainable = [[p.requires_grad for p in holder.parameters()] for holder in (self, other)]
        return (
            self.record() == other.record()
            and self.initial == other.initial
            and trainable[0] == trainable[1]
        )

    def extra_repr(self) -> str:
        """Variant, options and implementation."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.variant!r}, impl={self.impl!r}{options}"
