"""Launches of every Triton kernel as the package makes them, one op family a file: `launches()`, `KERNELS`."""
