"""The child module `attn_variant` of a patched attention module: its variant and parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnvariants.hf.penalties import AUTO

CHILD = "attn_variant"
# How a module is made to compute its variant, as the argument backend of `patch`.
DISPATCH = "dispatch"
HOOK = "softmax-hook"
# Attribute of parameters that transformers >= 5 has loaded.
_LOADED = "_is_hf_initialized"


class Spec(NamedTuple):
    """What an attention module computes: arguments for `attention`."""

    variant: str
    impl: str
    options: dict[str, Any]
    penalties: str | float = AUTO


class AttnVariant(nn.Module):
    """Variant, options and learned parameters of one attention module.

    The parameters are read through `forward`, so that wrappers which act around it (PEFT's
    `modules_to_save`, accelerate's offloading, FSDP) see the read.
    """

    # Whether the parameters have values; not if they were made on no device, for a checkpoint.
    _settled = True
    # Whether to warn of learned values that a checkpoint lacked; where nothing else looks for them.
    tells = False

    def __init__(
        self,
        variant: str,
        impl: str,
        options: Mapping[str, Any],
        learned: Mapping[str, Tensor],
        trainable: bool,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.variant = variant
        self.impl = impl
        self.options = dict(options)
        self.learned = tuple(learned)
        self.trainable = trainable
        self.masks: str | None = None
        self.penalties: str | float = AUTO
        self.backend = DISPATCH
        self.initial = {name: value.tolist() for name, value in learned.items()}
        for name, value in learned.items():
            parameter = nn.Parameter(value.to(device), requires_grad=trainable)
            self.register_parameter(name, parameter)
            self._settled = self._settled and not parameter.is_meta

    def forward(self, query: Tensor | None = None) -> Spec:
        """The spec with the parameters as they are now; `query` is there for wrappers."""
        options = dict(self.options)
        for name in self.learned:
            options[name] = getattr(self, name)
        return Spec(self.variant, self.impl, options, self.penalties)

    @property
    def _is_hf_initialized(self) -> bool:
        """What transformers asks of each module when it has loaded: whether to leave it alone.

        It is; learned values that the checkpoint did not bring have got their initial ones then.
        """
        if not self._settled:
            self._settle()
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        # transformers 4 sets it, before the values come, if it found all of them in the checkpoint
        self._settled = value

    def _settle(self) -> None:
        own = {name: self.get_parameter(name) for name in self.learned}
        here = {name: value for name, value in own.items() if not value.is_meta}
        lacking = [n for n, value in here.items() if not getattr(value, _LOADED, False)]
        self.reset_parameters(lacking)
        if lacking and self.tells:
            warnings.warn(
                f"the checkpoint lacks the learned {', '.join(lacking)} of a {self.variant!r} that "
                "its config records; it has the initial values from the record.",
                stacklevel=4,
            )
        if not self.trainable:
            # transformers makes every parameter it loads require a gradient
            self.requires_grad_(False)
        self._settled = len(here) == len(own)

    @torch.no_grad()
    def reset_parameters(self, names: Iterable[str] | None = None) -> None:
        """Give the learned values, or those named, what they had when the model was patched."""
        for name in self.learned if names is None else names:
            parameter = getattr(self, name)
            value = torch.tensor(self.initial[name], dtype=parameter.dtype, device="cpu")
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
            parameter.copy_(value)

    def record(self, *, current: bool = False) -> dict[str, Any]:
        """The spec as JSON-able values; learned options by name and initial value.

        Args:
            current: give the learned values of now as the initial ones.
        """
        record: dict[str, Any] = {
            "variant": self.variant,
            "impl": self.impl,
            "options": dict(self.options),
            "learned": list(self.learned),
        }
        if self.learned:
            initial = self.initial
            if current:
                initial = {name: getattr(self, name).tolist() for name in self.learned}
            record["initial"] = {
                name: values[0] if len(set(values)) == 1 else list(values)
                for name, values in initial.items()
            }
        if not self.trainable:
            record["trainable"] = False
        if self.masks not in (None, "lazy"):
            record["masks"] = self.masks
        if self.penalties != AUTO:
            record["penalties"] = self.penalties
        if self.backend != DISPATCH:
            record["backend"] = self.backend
        return record

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
