"""Invalid values of arguments: tables of functions, each of which makes one from a valid value."""

import decimal

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from problems import DTYPES


def spread(array, step):
    """The same values with a stride of `step` items along the last axis."""
    wide = np.zeros((*array.shape[:-1], array.shape[-1] * abs(step)), array.dtype)
    view = wide[..., ::step]
    view[...] = array
    return view


def misaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    return raw[1:].view(array.dtype).reshape(array.shape)


NOT_AN_ARRAY = {
    "number": lambda a: 3.0,
    "text": lambda a: "thetas",
    "bytes": lambda a: a.tobytes(),
    "memoryview": lambda a: memoryview(a),
    "dict": lambda a: dict(enumerate(a)),
    "set": lambda a: {1.0, 2.0},
    "generator": lambda a: (row for row in a),
    "object": lambda a: object(),
    "function": lambda a: np.ones,
    "numpy scalar": lambda a: np.float64(3.0),
    "numpy object": lambda a: np.random.default_rng(),
    "nested lists": lambda a: a.tolist(),
    "nested tuples": lambda a: tuple(map(tuple, a.reshape(-1, a.shape[-1]))),
    "list of numbers": lambda a: [1.0, 2.0, 3.0],
    "list of numpy scalars": lambda a: list(np.ones(3)),
    "list of texts": lambda a: ["a", "b", "c"],
    "list of None": lambda a: [None, None, None],
}


WRONG_DTYPE = {
    str(dtype): lambda a, dtype=dtype: abs(a).astype(dtype)
    for dtype in (
        *(np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64),
        *(np.complex64, np.complex128, np.object_, np.str_, ">f8", ml_dtypes.float8_e5m2, ml_dtypes.int4),
    )
} | {
    "long double": lambda a: a.astype(np.longdouble if np.longdouble(1).itemsize > 8 else np.clongdouble),
    "times": lambda a: np.zeros(a.shape, "M8[s]"),
    "records": lambda a: np.zeros(a.shape, [("x", np.float64)]),
}


OTHER_DTYPE = {name: lambda a, dtype=dtype: a.astype(dtype) for name, dtype in DTYPES.items() if name != "float64"}


WRONG_ROWS = {
    "0-d": lambda a: np.array(1.0),
    "1-d": lambda a: a[0],
    "3-d": lambda a: a[None],
    "no workers": lambda a: a[:0],
    "empty list": lambda a: [],
    "empty tuple": lambda a: (),
    "1025 workers": lambda a: np.zeros((1025, a.shape[1])),
    "1025 vectors": lambda a: [a[0]] * 1025,
    "list of matrices": lambda a: [a, a, a],
    "list of 0-d": lambda a: [np.array(1.0)] * 3,
    "unequal lengths": lambda a: [a[0], a[1, :-1], a[2]],
    "columns first": lambda a: np.asfortranarray(a),
    "every second column": lambda a: spread(a, 2),
    "columns reversed": lambda a: a[:, ::-1],
    "rows reversed": lambda a: a[::-1],
    "one row repeated": lambda a: np.broadcast_to(a[0], a.shape),
    "rows that overlap": lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (a.itemsize, a.itemsize)),
    "list of strided rows": lambda a: list(spread(a, 2)),
    "items misaligned": misaligned,
}


WRONG_SHAPE = {
    "a worker fewer": lambda a: a[:-1],
    "a worker more": lambda a: np.vstack([a, a[:1]]),
    "a coordinate fewer": lambda a: a[:, :-1].copy(),
    "no coordinates": lambda a: a[:, :0].copy(),
    "transposed": lambda a: a.T.copy(),
    "a vector fewer": lambda a: list(a[:-1]),
}


WRONG_VECTOR = {
    "0-d": lambda a: np.array(1.0),
    "2-d": lambda a: a[None],
    "column": lambda a: a[:, None],
    "an item fewer": lambda a: a[:-1].copy(),
    "an item more": lambda a: np.append(a, 1.0),
    "empty": lambda a: a[:0],
}


WRONG_STRIDES = {
    "every second item": lambda a: spread(a, 2),
    "reversed": lambda a: a[::-1],
    "one item repeated": lambda a: np.broadcast_to(a[:1], a.shape),
    "items misaligned": misaligned,
}


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


NOT_A_NUMBER = {repr(value): lambda a, value=value: value for value in ("0.5", b"1", [0.5], (0.5,), {}, 1j, object)} | {
    "True": lambda a: True,
    "numpy bool": lambda a: np.True_,
    "vector": lambda a: np.array([0.5]),
    "decimal": lambda a: decimal.Decimal("0.5"),
}


NOT_FINITE = {
    "nan": lambda a: float("nan"),
    "inf": lambda a: float("inf"),
    "-inf": lambda a: -float("inf"),
    "float32 nan": lambda a: np.float32("nan"),
    "beyond float64": lambda a: 10**400,
}


NEGATIVE = {"-1": lambda a: -1, "tiny": lambda a: -5e-324, "numpy": lambda a: np.float16(-0.5)}


NONE = {"None": lambda a: None}


NOT_A_FRACTION = {repr(value): lambda a, value=value: value for value in (0, 0.0, -0.0, 1, 1.0, 1.5, np.float32(1))}


NOT_AN_INTEGER = {
    repr(value): lambda a, value=value: value for value in (1.0, 0.5, "1", [1], 1j, np.float64(1), float("nan"))
} | {"True": lambda a: True, "numpy bool": lambda a: np.False_, "array": lambda a: np.array([1])}


NEGATIVE_INTEGER = {"-1": lambda a: -1, "numpy": lambda a: np.int64(-3), "huge": lambda a: -(10**30)}


UNKNOWN_WORD = {
    repr(word): lambda a, word=word: word
    for word in (
        "",
        "ignore",
        "Raise",
        "SIGMA",
        " sigma",
        "none",
        "float32",
        "double",
        "float64 ",
        "curvature\0",
    )
}


NOT_A_WORD = {
    repr(value): lambda a, value=value: value for value in (True, False, 0, 1, 0.5, b"sigma", ["raise"], np.float64)
}


scalars = st.one_of(st.none(), st.booleans(), st.text(), st.binary(), st.complex_numbers(), st.floats(), st.integers())


nested = st.recursive(scalars, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=5)
