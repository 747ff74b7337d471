"""The Numba kernels of the CPU."""
