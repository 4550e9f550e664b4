"""Which engines the contract's tests run: the kernels in a process of their own, interpreted.

TRITON_INTERPRET is read when kernels are defined, so `make test` runs pytest a second time with it.
"""

import pytest
import torch

from attnvariants_kernels._triton import INTERPRETED, why_not

CUDA = torch.cuda.is_available()
KERNELS_RUN = not why_not() and (INTERPRETED or CUDA)
ENGINES = ["triton"] if INTERPRETED else ["reference", "chunked"]


def most(values, default):
    """Parameters of a test; interpreted, those that are not `default` run in `make nightly`.

    The interpreter takes a hundred times as long, and the golden vectors and the templates' own
    tests run every variant in it by default.
    """
    marks = {False: pytest.mark.nightly} if INTERPRETED else {}
    return [
        pytest.param(*value, marks=marks.get(value in default, ()))
        if isinstance(value, tuple)
        else pytest.param(value, marks=marks.get(value in default, ()))
        for value in values
    ]


kernels_run = pytest.mark.skipif(
    not KERNELS_RUN,
    reason=why_not() or "kernels run on a CUDA device, or on a CPU with TRITON_INTERPRET=1",
)
kernels_compile = pytest.mark.skipif(
    bool(why_not()) or INTERPRETED, reason=why_not() or "TRITON_INTERPRET=1 replaces the compiler"
)
torch_engines = pytest.mark.skipif(
    INTERPRETED, reason="it is about the engines in torch, which the other run of pytest tests"
)
