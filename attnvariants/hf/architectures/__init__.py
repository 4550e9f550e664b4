"""Every architecture of transformers, built tiny and patched: what stays equal, what refuses."""
