"""A true bfloat16 and products in Triton's interpreter, for the launches of this package alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

# the interpreter keeps its state in modules, and so does what is mended here
_one_at_a_time = RLock()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Round to the nearest bfloat16 and multiply values, as a GPU does, while inside.

    Triton's interpreter holds bfloat16 as 16 bits of an integer: it truncates to them, and a
    product is that of the bits. Its sums of products depend on which operand comes first, so that
    a backward would not find the scores of its forward: here they are rounded once.
    """
    import numpy
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder: Any = InterpreterBuilder
    with _one_at_a_time:
        cast, dot = builder.cast_impl, builder.create_dot

        def rounded(self: Any, source: Any, dtype: Any) -> Any:
            if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
                return cast(self, source, dtype)
            values = torch.from_numpy(source.data.copy()).bfloat16()
            return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

        def summed(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
            if acc.dtype.scalar != tl.float32:
                return dot(self, a, b, acc, *rest)
            if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
                a, b = (cast(self, x, tl.float32) for x in (a, b))
            found = numpy.matmul(a.data, b.data, dtype=numpy.float64) + acc.data
            return TensorHandle(found.astype(numpy.float32), tl.float32)

        builder.cast_impl, builder.create_dot = rounded, summed
        try:
            yield
        finally:
            builder.cast_impl, builder.create_dot = cast, dot
