"""Triton kernels of attnvariants. None yet: `impl="chunked"` runs everywhere meanwhile."""
