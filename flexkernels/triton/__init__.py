"""Triton kernels, one op family a file. Imported by the first call that a Triton backend serves."""
