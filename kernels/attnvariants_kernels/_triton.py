"""`triton`, `tl` and `jit`: the real ones, or inert stand-ins where Triton cannot be used.

Kernels and hooks are defined at import, so that one file can hold a variant's formula, reference
and hooks; where Triton is missing or out of range they are defined and never called, and
`why_not()` says what is missing at the call.
"""

from __future__ import annotations

import os
from typing import Any

VERSIONS = (3, 6), (3, 10)
_WANTED = "Triton >= 3.6 and < 3.10 (pip install 'attnvariants[triton]')"


class _Inert:
    """Takes the place of a module, a decorator and a type annotation alike."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def _inert_jit(function: Any = None, **options: Any) -> Any:
    return function if callable(function) else lambda decorated: decorated


_problem = ""
try:
    import triton

    _version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if VERSIONS[0] <= _version < VERSIONS[1]:
        import triton.language as tl
        from triton.language.target_info import cuda_capability_geq, is_cuda
    else:
        _problem = f"{_WANTED} is needed, found {triton.__version__}"
# a build that does not match its driver or its libraries raises anything
except Exception as error:
    _problem = f"{_WANTED} is needed, and it cannot be imported ({error})"

if _problem:
    triton = tl = is_cuda = cuda_capability_geq = _Inert()
    jit: Any = _inert_jit
else:
    jit = triton.jit

# Triton reads it when `jit` runs, so the answer holds for the process.
INTERPRETED = not _problem and os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not() -> str:
    """Why no kernel can run, as a clause; empty if one can."""
    return _problem
