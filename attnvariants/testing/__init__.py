"""What engines and variants are tested by: the contract's suite, a judge of rounding, a fuzz.

from attnvariants.testing import conformance
print(conformance("my_variant", impl="triton"))

`python -m attnvariants.testing fuzz --cases 1000` tries random calls. Kernels need a GPU, or
TRITON_INTERPRET=1 in the environment before anything is imported.
"""

from attnvariants.testing.contract import (
    CASES,
    TILED_CASES,
    Cell,
    Report,
    conformance,
    dead_rows,
    make_inputs,
    pad,
    random,
    refused,
)

__all__ = [
    "CASES",
    "TILED_CASES",
    "Cell",
    "Report",
    "conformance",
    "dead_rows",
    "make_inputs",
    "pad",
    "random",
    "refused",
]
