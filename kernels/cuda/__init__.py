"""The CUDA kernels, and their launches beside them."""
