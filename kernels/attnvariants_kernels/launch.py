"""One kernel launch as data: it can be run, or compiled for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from attnvariants_kernels._triton import INTERPRETED, triton
from attnvariants_kernels.interpreter import as_on_a_gpu

# Token strides up to this one keep the offsets inside a tile, of 128 rows at most, in 32 bits.
_WIDEST_STRIDE = 2**24


class Config(NamedTuple):
    """A block configuration.

    Attributes:
        block_m: query rows of a tile.
        block_n: keys of a tile.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments.

    Attributes:
        kernel: the `@jit` function.
        grid: up to three sizes.
        arguments: runtime arguments by name; tensors may be on the meta device for `compile`.
        constants: compile-time arguments by name.
        config: what was chosen for it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def _compile_options(self) -> dict[str, Any]:
        # scale and pivot are meant to be one FMA, whatever Triton's default becomes
        return {
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            "enable_fp_fusion": True,
            **self.options,
        }

    def run(self) -> None:
        """Launch it; an empty grid does nothing."""
        if all(self.grid):
            with as_on_a_gpu() if INTERPRETED else self._on_device():
                self.kernel[self.grid](**self.arguments, **self.constants, **self._compile_options)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, wherever the tensors are."""
        for value in self.arguments.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                return torch.cuda.device(value.device)
        return nullcontext()

    def compile(self, target: str) -> Any:
        """Triton's `CompiledKernel` for a target such as "sm_90" or "gfx942"; needs no GPU.

        Through the same argument binder as a launch, so that what is compiled is what would run.
        """
        from triton.runtime import driver

        before = driver._active
        driver.set_active(_NoDevice(target))
        try:
            self.kernel.device_caches.clear()
            return self.kernel.warmup(
                grid=self.grid,
                **{name: _mock(value) for name, value in self.arguments.items()},
                **self.constants,
                **self._compile_options,
            )
        finally:
            self.kernel.device_caches.clear()
            # reset_active would look for a device
            driver._active = before


def run_first(make: Callable[[Config], Sequence[Launch]], configs: Sequence[Config]) -> Config:
    """Run the launches of the first configuration that fits the device, and say which it was.

    Raises:
        triton.runtime.errors.OutOfResources: none of them fits.
    """
    for config in configs[:-1] if not INTERPRETED else ():
        try:
            for launch in make(config):
                launch.run()
        except triton.runtime.errors.OutOfResources:
            continue
        return config
    for launch in make(configs[-1] if not INTERPRETED else configs[0]):
        launch.run()
    return configs[-1]


def addressable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its strides are beyond the kernels: [.., rows, width].

    They take any strides of the leading dimensions, neighbours along the last, and rows so far
    apart that a tile is not further across than 32 bits count.
    """
    neighbours = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    near = tensor.stride(-2) <= _WIDEST_STRIDE or tensor.shape[-2] == 1
    return tensor if neighbours and near else tensor.contiguous()


def target_of(name: str) -> Any:
    """Triton's `GPUTarget` of "sm_80", "sm_90", "sm_100" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


class _NoDevice:
    """A driver for a target that is not here: enough to bind arguments and to compile."""

    def __init__(self, target: str):
        self.target = target_of(target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def set_current_device(self, device: Any) -> None:
        pass


class _Pointer:
    """An aligned pointer of some dtype that points nowhere."""

    def __init__(self, dtype: Any):
        self.dtype = dtype

    @staticmethod
    def data_ptr() -> int:
        return 16

    @staticmethod
    def ptr_range() -> int:
        return 0


def _mock(value: Any) -> Any:
    if hasattr(value, "data_ptr"):
        return _Pointer(value.dtype)
    if isinstance(value, tuple):
        parts = [_mock(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
