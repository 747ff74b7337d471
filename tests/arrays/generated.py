"""Arguments for generated calls: good, odd or bad, in every library, dtype and layout."""

import dataclasses
import fractions
from typing import Any, NamedTuple

import numpy as np
from array_libraries import INSTALLED, Capsule, Library
from hypothesis import strategies as st
from invalid_values import (
    NEGATIVE,
    NEGATIVE_INTEGER,
    NONE,
    NOT_A_FRACTION,
    NOT_A_NUMBER,
    NOT_A_WORD,
    NOT_AN_ARRAY,
    NOT_AN_INTEGER,
    NOT_FINITE,
    UNKNOWN_WORD,
    WRONG_DTYPE,
    WRONG_ROWS,
    WRONG_STRIDES,
    WRONG_VECTOR,
    nested,
    read_only,
)
from problems import DTYPES

import fastnewton as fn

MARK = 7.0


class Given(NamedTuple):
    """An argument, the errors of which a bad one must raise one, and where the rows of a good one lie."""

    value: Any
    errors: frozenset = frozenset()
    rows: tuple[int, ...] = ()


class Shape(NamedTuple):
    """What the arrays of one call have in common."""

    library: str
    dtype: str
    m: int
    n: int

    @property
    def side(self):
        return Library("numpy" if self.library == "capsule" else self.library)

    def wrapped(self, array):
        return Capsule(array) if self.library == "capsule" else array

    def ones(self, *size):
        return np.ones(size, DTYPES[self.dtype])

    def refused(self, error, value, library="numpy"):
        """A bad array of a library that need not be that of the call."""
        return Given(value, frozenset({error} if library == self.library else {error, TypeError}))


# -- numbers and words ---------------------------------------------------------------------------------------


def good(*strategies):
    return st.one_of(*strategies).map(Given)


def bad(error, *tables, of=None):
    """Of what the functions in these tables make."""
    makers = [make for table in tables for make in table.values()]
    return st.sampled_from(makers).map(lambda make: Given(make(of), frozenset({error})))


def words(*known):
    return good(st.sampled_from(known)), bad(TypeError, NOT_A_WORD) | bad(ValueError, UNKNOWN_WORD)


objects = nested.filter(lambda value: value is not None).map(lambda value: Given(value, frozenset({TypeError})))
lengths = st.floats(0, 10) | st.integers(0, 10) | st.floats(0, 10, width=32).map(np.float32)
bad_lengths = bad(TypeError, NOT_A_NUMBER) | bad(ValueError, NOT_FINITE, NEGATIVE)
OPTIONS = {
    "lr": (good(lengths), bad_lengths | bad(TypeError, NONE)),
    "lr_rest": (good(lengths, st.none()), bad_lengths),
    "cutoff": (
        good(st.floats(1e-6, 0.9), st.sampled_from([fractions.Fraction(1, 3), np.float16(0.25)])),
        bad(TypeError, NOT_A_NUMBER, NONE) | bad(ValueError, NOT_FINITE, NEGATIVE, NOT_A_FRACTION),
    ),
    "max_rank": (
        good(st.none(), st.integers(0, 1 << 70), st.integers(0, 9).map(np.int8)),
        bad(TypeError, NOT_AN_INTEGER) | bad(ValueError, NEGATIVE_INTEGER),
    ),
    "lr_cap": words(None, "sigma", "curvature"),
    "nonfinite": words("raise", "drop", "propagate"),
    "precision": words(None, "float64"),
    "mode": words("sync", "async"),
    "exchange": words("auto", "allgather", "sharded"),
    "min_cosine": (
        good(st.none(), st.floats(0, 0.99), st.sampled_from([0, fractions.Fraction(1, 4), np.float16(0.25)])),
        bad_lengths | st.sampled_from([1, 1.0, np.float32(2)]).map(lambda value: Given(value, frozenset({ValueError}))),
    ),
    "max_coefficient": (good(st.none(), lengths), bad_lengths),
    "max_newton_norm": (good(st.none(), lengths), bad_lengths),
    "fallback_lr": (good(st.none(), lengths), bad_lengths),
    "curvature": words("keep", "drop", "abs"),
    "safeguards": (
        good(st.none(), st.sampled_from([fn.Safeguards(), fn.Safeguards(None, 5.0, "abs", 0.5, 0.01)])),
        objects | st.just(Given(fn.Safeguards, frozenset({TypeError}))),
    ),
}


# -- arrays --------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw, sizes, dtypes):
    library = draw(st.sampled_from([*INSTALLED, "capsule"]))
    dtypes = [name for name in dtypes if name != "bfloat16" or library != "capsule"]
    n = st.integers(0, 70) | st.sampled_from([1023, 1024, 1025, 2050])
    return Shape(library, draw(st.sampled_from(dtypes)), draw(st.sampled_from(sizes)), draw(n))


@st.composite
def good_rows(draw, shape):
    """Some layout of numbers of order 1; at times all alike, or not finite in some of the rows."""
    values = np.random.default_rng(draw(st.integers(0, 1 << 32))).standard_normal((shape.m, shape.n))
    oddity = draw(st.integers(0, 9))
    if oddity == 0:
        values[...] = draw(st.sampled_from([0.0, 1.0, -3.5]))
    elif oddity == 1 and shape.n:
        rows = sorted(draw(st.sets(st.integers(0, shape.m - 1), min_size=1)))
        values[rows, draw(st.integers(0, shape.n - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    step, before, after = (draw(st.integers(*bounds)) for bounds in ((1, 3), (0, 5), (0, 5)))
    if shape.library == "jax":  # which has no views
        step, before, after = 1, 0, 0
    table = np.zeros((step * shape.m, before + shape.n + after), DTYPES[shape.dtype])
    table[::step, before : before + shape.n] = values
    rows = shape.side.make(table)
    if shape.library != "jax":
        rows = rows[::step, before : before + shape.n]
    if shape.side.name == "numpy" and draw(st.booleans()):
        rows.flags.writeable = False
    kind = draw(st.sampled_from([None, list, tuple]))
    if kind is not None:
        each = [rows[k] for k in range(shape.m)]
        return Given(kind(map(shape.wrapped, each)), rows=tuple(map(shape.side.pointer, each)))
    first, spacing = shape.side.pointer(rows), step * table.strides[0]
    return Given(shape.wrapped(rows), rows=tuple(first + k * spacing for k in range(shape.m)))


def bad_rows(shape):
    """What is bad whatever the other arguments are."""
    return (
        objects
        | bad(TypeError, NOT_AN_ARRAY, WRONG_DTYPE, of=np.ones((shape.m, shape.n)))
        | st.sampled_from(list(WRONG_ROWS.values())).map(
            lambda make: shape.refused(ValueError, make(shape.ones(shape.m, shape.n)))
        )
    )


@st.composite
def unlike(draw, shape, *size):
    """What is good alone, but of another library, dtype or length than the other arguments."""
    fault = draw(st.sampled_from(["library", "dtype", "length"]))
    if fault == "library":
        name = draw(st.sampled_from([name for name in (*INSTALLED, "capsule") if name != shape.library]))
        other = shape._replace(library=name)
        return Given(other.wrapped(other.side.make(shape.ones(*size))), frozenset({TypeError}))
    if fault == "dtype":
        name = draw(st.sampled_from([name for name in DTYPES if name != shape.dtype]))
        return Given(np.ones(size, DTYPES[name]), frozenset({TypeError}))
    return shape.refused(ValueError, shape.ones(*size[:-1], size[-1] + draw(st.sampled_from([-1, 1]))))


def good_vector(shape):
    def first(found):
        rows = found.value._array if isinstance(found.value, Capsule) else found.value
        row = rows[0]._array if isinstance(rows[0], Capsule) else rows[0]
        return Given(shape.wrapped(row), rows=(shape.side.pointer(row),))

    return good_rows(shape._replace(m=1)).map(first)


def bad_vector(shape):
    return bad_alone(shape) | unlike(shape, shape.n)


def bad_alone(shape):
    """A vector that is bad beside no other."""
    makers = [*WRONG_STRIDES.values(), *(WRONG_VECTOR[name] for name in ("0-d", "2-d", "column"))]
    return (
        objects
        | bad(TypeError, NOT_AN_ARRAY, WRONG_DTYPE, of=np.ones(shape.n))
        | st.sampled_from(makers).map(lambda make: shape.refused(ValueError, make(shape.ones(shape.n))))
    )


@st.composite
def good_out(draw, shape):
    if shape.library == "jax" or draw(st.booleans()):
        return Given(None)
    table = shape.side.make(np.full(shape.n + 6, MARK, DTYPES[shape.dtype]))
    start = draw(st.integers(0, 6))
    out = table[start : start + shape.n]
    return Given(shape.wrapped(out), rows=(shape.side.pointer(out),))


def bad_out(shape):
    if shape.library == "jax":
        immutable = Given(shape.side.make(shape.ones(shape.n)), frozenset({TypeError}))
        return bad_vector(shape) | st.just(immutable)
    return bad_vector(shape) | st.just(shape.refused(ValueError, read_only(shape.ones(shape.n))))


@st.composite
def good_coefficients(draw, shape):
    values = np.random.default_rng(draw(st.integers(0, 1 << 32))).standard_normal(2 * shape.m)
    values = values.astype(draw(st.sampled_from([np.float32, np.float64])))
    library = Library(draw(st.sampled_from(INSTALLED)))
    if library.name == "numpy" and draw(st.booleans()):
        return Given(values[::-2])
    return Given(library.make(values[: shape.m]))


bad_field = st.sampled_from([None, "1", 1j, np.ones(2), np.eye(3, dtype=np.float32), [[1.0]], np.eye(5)[:, ::-1]])


@st.composite
def wild_matrix(draw, m):
    wild = st.floats(-1e3, 1e3) | st.sampled_from([0.0, np.nan, np.inf, 1e300, -1e300, 5e-324])
    return np.array(draw(st.lists(wild, min_size=m * m, max_size=m * m))).reshape(m, m)


@st.composite
def good_gram(draw, shape, joint=False):
    """Of gradients, or made by hand of anything, since the arithmetic of others may be off."""
    grads, thetas = np.random.default_rng(draw(st.integers(0, 1 << 32))).standard_normal((2, shape.m, 50))
    found = fn.gram(grads, thetas=thetas if joint else None)
    if draw(st.booleans()):
        names = ("matrix", "theta_matrix", "cross_matrix") if joint else ("matrix",)
        made = {name: draw(wild_matrix(shape.m)) for name in names}
        found = dataclasses.replace(found, **made, norm2=draw(st.floats()), floor=draw(st.floats()))
    return Given(found)


@st.composite
def good_spectrum(draw, shape):
    return Given(fn.spectrum(draw(good_gram(shape)).value, cutoff=draw(st.floats(1e-6, 0.9))))


@st.composite
def bad_gram(draw, shape):
    name = draw(st.sampled_from(["matrix", "projection", "norm2", "floor", "theta_matrix", "cross_matrix"]))
    value = draw(bad_field.filter(lambda value: value is not None or "_" not in name))
    made = dataclasses.replace(draw(good_gram(shape)).value, **{name: value})
    return draw(objects | st.just(Given(made, frozenset({TypeError, ValueError}))))


def choices(argument, shape, function):
    """Good and bad values of one argument.  Of the arrays, grads is never merely unlike the others: they are."""
    if argument in OPTIONS:
        return OPTIONS[argument]
    m, n = shape.m, shape.n
    vectors = bad(TypeError, NOT_AN_ARRAY, WRONG_DTYPE, of=np.ones(m)) | bad(ValueError, WRONG_VECTOR, of=np.ones(m))
    others = good_spectrum(shape._replace(m=m + 1)).map(lambda found: found._replace(errors=frozenset({ValueError})))
    found = {
        "thetas": lambda: (good_rows(shape), bad_rows(shape) | unlike(shape, m, n)),
        "grads": lambda: (good_rows(shape), bad_rows(shape)),
        "z": lambda: (good_vector(shape), bad_vector(shape)),
        "out": lambda: (good_out(shape), bad_out(shape)),
        "coefficients": lambda: (good_coefficients(shape), vectors),
        "gram": lambda: (good_gram(shape, joint=function == "diagnostics"), bad_gram(shape)),
        "spectrum": lambda: (good_spectrum(shape), objects | others),
    }[argument]()
    if function == "gram" and argument in ("z", "thetas"):
        return good(st.none()) | found[0], found[1]
    return found
