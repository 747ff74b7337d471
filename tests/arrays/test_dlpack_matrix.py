"""Every library as source and as destination, in every dtype and layout: taken without a copy, or refused untouched."""

import numpy as np
import pytest
from array_libraries import INSTALLED, Capsule, Library
from problems import DTYPES, workers
from reads import reads

import fastnewton as fn
from fastnewton import arrays

M, N = 3, 130
LIBRARIES = (*INSTALLED, "capsule")
# NumPy neither exports nor imports bfloat16.
PAIRS = [
    (source, destination, dtype)
    for source in LIBRARIES
    for destination in (None, *LIBRARIES)
    for dtype in DTYPES
    if dtype != "bfloat16" or "capsule" not in (source, destination)
]
BORROWED = [
    (owner, borrower, dtype)
    for owner in INSTALLED
    for borrower in INSTALLED
    for dtype in DTYPES
    if dtype != "bfloat16" or "numpy" not in (owner, borrower)
]


pytestmark = pytest.mark.usefixtures("x64")


def library_of(name):
    return Library("numpy" if name == "capsule" else name)


def wrapped(name, array):
    return Capsule(array) if name == "capsule" else array


# -- layouts: (what is handed over, the addresses of its rows) --------------------------------------------------


def whole(library, values):
    array = library.make(values)
    return array, [library.pointer(array) + k * values.strides[0] for k in range(len(values))]


def part_of_a_table(library, values, step, shift):
    if library.name == "jax":  # which has no views
        return whole(library, values)
    m, n = values.shape
    table = np.full((step * m, n + 2 * shift), 7, values.dtype)
    view = library.make(table)[::step, shift : n + shift]
    if library.name == "torch":
        view.copy_(library.make(values))
    else:
        view[...] = library.make(values)
    return view, [library.pointer(view) + k * step * table.strides[0] for k in range(m)]


def read_only(library, values):
    if library.name == "numpy":
        array = values.copy()
        array.flags.writeable = False
        return array, [array.ctypes.data + k * values.strides[0] for k in range(len(values))]
    return whole(library, values)  # the others have no such flag: JAX's always are, torch's never


def separate(library, values):
    rows = [library.make(row) for row in values]
    return rows, [library.pointer(row) for row in rows]


LAYOUTS = {
    "whole": whole,
    "strided": lambda library, values: part_of_a_table(library, values, 2, 0),
    "offset": lambda library, values: part_of_a_table(library, values, 1, 3),
    "read-only": read_only,
    "separate": separate,
    "no coordinates": lambda library, values: whole(library, values[:, :0].copy()),
}


def given_rows(name, layout, values):
    library = library_of(name)
    rows, addresses = LAYOUTS[layout](library, values)
    return [wrapped(name, row) for row in rows] if layout == "separate" else wrapped(name, rows), addresses


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("source", "destination", "dtype"), PAIRS)
def test_step(rng, source, destination, dtype, layout):
    values = workers(rng, M, N, DTYPES[dtype])
    (thetas, theta_rows), (grads, grad_rows) = (given_rows(source, layout, each) for each in values)
    n = 0 if layout == "no coordinates" else N
    expected = fn.step(*(each[:, :n].copy() for each in values), lr=0.5)[0]
    out = out_bytes = None
    if destination is not None:
        there = library_of(destination)
        own = there.make(np.full(n, 7, DTYPES[dtype]))
        out, out_bytes = wrapped(destination, own), there.bits(own)
    if destination == "jax" or (destination is not None and destination != source):
        with reads() as seen, pytest.raises(TypeError, match=r"\bout\b"):
            fn.step(thetas, grads, lr=0.5, out=out)
        assert there.bits(own) == out_bytes
        assert not seen
        return
    with reads() as seen:
        theta, _ = fn.step(thetas, grads, lr=0.5, out=out)
    if n:
        assert (seen["thetas"], seen["grads"]) == (tuple(theta_rows), tuple(grad_rows))
    if out is not None:
        assert theta is out
        found = own
    else:
        found = np.from_dlpack(theta) if source == "capsule" else theta
    library = library_of(source)
    assert library.is_array(found)
    assert library.bits(found) == expected.tobytes()
    if n:
        assert seen["out"] == (library.pointer(found),)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bfloat16"])  # which CuPy lacks
@pytest.mark.parametrize("destination", [None, "cupy", *LIBRARIES])
def test_step_of_cupy(rng, destination, dtype, layout):
    values, side = workers(rng, M, N, DTYPES[dtype]), Library("cupy")
    (thetas, theta_rows), (grads, grad_rows) = (given_rows("cupy", layout, each) for each in values)
    n = 0 if layout == "no coordinates" else N
    expected = side.bits(fn.step(*(side.make(each[:, :n].copy()) for each in values), lr=0.5)[0])
    if n:
        assert arrays.rows(thetas, "thetas").table.tolist() == theta_rows
        assert arrays.rows(grads, "grads").table.tolist() == grad_rows
    if destination in (None, "cupy"):
        out = destination and side.make(np.full(n, 7, DTYPES[dtype]))
        theta, _ = fn.step(thetas, grads, lr=0.5, out=out)
        assert out is None or theta is out
        assert side.is_array(theta)
        assert side.bits(theta) == expected
        return
    there = library_of(destination)
    own = there.make(np.full(n, 7, DTYPES[dtype]))
    before = there.bits(own)
    with pytest.raises(TypeError, match=r"\bout\b"):
        fn.step(thetas, grads, lr=0.5, out=wrapped(destination, own))
    assert there.bits(own) == before


@pytest.mark.parametrize("layout", ["strided", "offset", "read-only"])
@pytest.mark.parametrize(
    ("library", "dtype"), [(one, dtype) for one, other, dtype in PAIRS if one == other and one != "jax"]
)
def test_out_is_part_of_something_larger(rng, library, dtype, layout):
    side, values = library_of(library), workers(rng, M, N, DTYPES[dtype])
    rows = [wrapped(library, side.make(each)) for each in values]
    if layout == "read-only" and library != "torch":
        own, _ = read_only(side, np.full((1, N), 7, DTYPES[dtype]))
        own, table = own[0], own
    else:
        table = side.make(np.full((3, 2 * N), 7, DTYPES[dtype]))
        own = table[1, 5 : N + 5] if layout != "strided" else table[1, ::2]
    before = side.bits(table)
    out = wrapped(library, own)
    if layout == "strided" or (layout == "read-only" and library != "torch"):
        with pytest.raises(ValueError, match=r"\bout\b"):
            fn.step(*rows, lr=0.5, out=out)
        assert side.bits(table) == before
        return
    assert fn.step(*rows, lr=0.5, out=out)[0] is out
    expected = np.full((3, 2 * N), 7, DTYPES[dtype])
    expected[1, 5 : N + 5] = fn.step(*values, lr=0.5)[0]
    assert side.bits(table) == expected.tobytes()


@pytest.mark.parametrize(("owner", "borrower", "dtype"), BORROWED)
def test_memory_of_another_library(rng, owner, borrower, dtype):
    """What one library made of another one's array through DLPack is read where it is."""
    values = workers(rng, M, 128, DTYPES[dtype])  # rows of whole cache lines, without which JAX copies
    expected = fn.step(*values, lr=0.5)[0]
    own, other = library_of(owner), library_of(borrower)
    kept, borrowed = [], []
    for each in values:
        memory = _on_a_cache_line(each) if owner == "numpy" else own.make(each)
        kept.append(memory)
        borrowed.append((other.module.dlpack if borrower == "jax" else other.module).from_dlpack(memory))
    with reads() as seen:
        theta, _ = fn.step(*borrowed, lr=0.5)
    assert [seen[name][0] for name in ("thetas", "grads")] == [other.pointer(each) for each in borrowed]
    assert other.is_array(theta)
    assert other.bits(theta) == expected.tobytes()
    if borrower == "numpy" and owner == "jax":  # JAX's arrays stay immutable on the way
        with pytest.raises(ValueError, match="out must be writable"):
            fn.step(*values, lr=0.5, out=borrowed[0][0])
        assert own.bits(kept[0]) == values[0].tobytes()


def _on_a_cache_line(values):
    buffer = np.zeros(values.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    array = buffer[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array
