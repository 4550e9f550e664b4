"""The figures of a self-test in float64, where a leak stays and rounding is gone."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from attnvariants.hf.holder import AttnVariant
from attnvariants.hf.judge import EXACT, NEARLY_CAUSAL, Measured
from attnvariants.hf.measure import Part, Runs, leak_part, measured
from attnvariants.hf.modes import unpatched, watching
from attnvariants.hf.names import implementation_of, set_implementation
from attnvariants.hf.outputs import sentence
from attnvariants.hf.probe import Probe
from attnvariants.hf.reasons import UnavailableError

Configs = list[tuple[Any, str]]


class Exactly:
    """A copy of a patched model in float64, made when it is first asked for.

    Attributes:
        probe: what the model is run on; set before figures are asked for.
        parts: gives the comparisons of a model on a probe; likewise.
    """

    probe: Probe
    parts: Callable[[nn.Module, Probe], list[Part]]

    def __init__(self, root: nn.Module, configs: Configs):
        """Remember a patched model, whose configs name our operators now.

        Args:
            root: the patched model.
            configs: the switched configs with their previous operators.
        """
        self.root, self.configs = root, configs
        self.ours = [implementation_of(config) for config, _ in configs]
        self._made: tuple[nn.Module, Configs, Probe] | None = None

    def figures(self, place: int) -> tuple[Measured, Measured]:
        """A part's figures of the unpatched and the patched model.

        Raises:
            UnavailableError: there is no such copy of this model.
        """
        root, configs, probe = self.made()
        part = self.parts(root, probe)[place]
        with unpatched(configs):
            own = measured(part, Runs(root))
        holders: dict[str, nn.Module] = {
            name: module for name, module in root.named_modules() if isinstance(module, AttnVariant)
        }
        with watching(holders) as reached:
            got = measured(part, Runs(root))
        if not reached and not isinstance(got, Exception):
            raise UnavailableError("a copy of the model does not run its variant")
        return own, got

    def is_causal(self, own_leak: float, half: bool) -> bool:
        """Whether a change by a future token of the unpatched model is rounding.

        Args:
            own_leak: the change in the model's own precision.
            half: whether that is half precision.
        """
        if own_leak == 0 or own_leak > 0.05:
            return own_leak == 0
        try:
            root, configs, probe = self.made()
        except UnavailableError:
            return own_leak <= (1e-2 if half else NEARLY_CAUSAL)
        with unpatched(configs):
            exact = measured(leak_part(probe), Runs(root))
        return isinstance(exact, float) and exact <= EXACT

    def made(self) -> tuple[nn.Module, Configs, Probe]:
        """The copy, its configs and its inputs.

        Raises:
            UnavailableError: as `figures`.
        """
        if self._made is None:
            _refuse(self.root)
            known: dict[int, Any] = {}
            try:
                root = copy.deepcopy(self.root, known).double()
            except (RuntimeError, TypeError, MemoryError, ValueError) as error:
                raise UnavailableError(
                    f"the model cannot be copied in float64 ({sentence(error)})"
                ) from error
            root.eval().requires_grad_(False)
            configs = []
            for (config, operator), ours in zip(self.configs, self.ours, strict=True):
                copied = known.get(id(config))
                if copied is None:
                    raise UnavailableError("a copy of the model does not hold all of its configs")
                # whatever the model names at the moment
                set_implementation(copied, ours)
                configs.append((copied, operator))
            self._made = root, configs, self.probe.double()
        return self._made


def _refuse(root: nn.Module) -> None:
    """Raise UnavailableError for models whose copy would be another computation, or too large."""
    weights = 0
    for parameter in root.parameters():
        if parameter.is_meta:
            raise UnavailableError("some of its weights are offloaded")
        if not parameter.is_floating_point():
            raise UnavailableError("some of its weights are quantised")
        if parameter.device.type == "mps":
            raise UnavailableError("its device has no float64")
        weights += parameter.numel()
    engines = {module.impl for module in root.modules() if isinstance(module, AttnVariant)}
    on_gpu = any(parameter.device.type == "cuda" for parameter in root.parameters())
    if "triton" in engines or (on_gpu and "auto" in engines):
        raise UnavailableError("its kernels have no float64, and another engine is another test")
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return
    if 8 * weights > free and not on_gpu:
        raise UnavailableError(f"a copy of its {weights:,} weights takes more memory than is free")
