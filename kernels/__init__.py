"""The kernels: one module a device, with the same functions on each side."""
