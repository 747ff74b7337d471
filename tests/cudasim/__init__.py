"""Run CUDA C++ kernels on the CPU, one fibre per CUDA thread (for tests only; see README.md)."""
