"""The array libraries, and exporters that are of none."""

import importlib.util

import ml_dtypes
import numpy as np
import pytest
from problems import DTYPES

INSTALLED = tuple(name for name in ("numpy", "torch", "jax") if importlib.util.find_spec(name) is not None)


class Library:
    """How one array library makes, reads and points to its arrays."""

    def __init__(self, name):
        self.name = name
        self.module = np if name == "numpy" else pytest.importorskip(name)
        if name == "jax":
            self.jnp = pytest.importorskip("jax.numpy")

    def __repr__(self):
        return self.name

    @property
    def array_type(self):
        return {"torch": "Tensor", "jax": "Array"}.get(self.name, "ndarray")

    def is_array(self, value):
        return isinstance(value, getattr(self.module, self.array_type))

    def dtype(self, name):
        if self.name == "torch":
            return getattr(self.module, name)
        return DTYPES[name]

    def make(self, array):
        """An array of this library with the bits of a NumPy array."""
        if self.name == "numpy":
            return array.copy()
        if self.name == "jax":
            return self.jnp.array(array)
        if self.name == "cupy":
            return self.module.array(array)
        if array.dtype == ml_dtypes.bfloat16:
            return self.module.tensor(array.view(np.int16)).view(self.module.bfloat16)
        return self.module.tensor(array)

    def bits(self, array):
        if self.name == "torch":
            integers = {2: self.module.int16, 4: self.module.int32, 8: self.module.int64}[array.element_size()]
            return array.contiguous().view(integers).numpy().tobytes()
        return (array.get() if self.name == "cupy" else np.asarray(array)).tobytes()

    def pointer(self, array):
        if self.name == "numpy":
            return array.ctypes.data
        if self.name == "cupy":
            return array.data.ptr
        return array.data_ptr() if self.name == "torch" else array.unsafe_buffer_pointer()


class Capsule:
    """An array of no known library."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Elsewhere(Capsule):
    """The same, on a ROCm device as far as it says."""

    def __dlpack_device__(self):
        return (10, 0)


class OldCapsule(Capsule):
    """An exporter from before DLPack 1.0: it knows no version and no copy=."""

    def __dlpack__(self, stream=None):
        return self._array.__dlpack__()
