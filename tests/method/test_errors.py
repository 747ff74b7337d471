"""Bad input: the type of the error, the name of the argument in its message, and nothing written."""

import decimal
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import DTYPES, workers

import fastnewton as fn

M, N = 3, 40
MARK = 7.0


class Call:
    """A public function with good arguments, one of which is to be spoilt."""

    def __init__(self, name, dtype=np.float64):
        rng = np.random.default_rng(1)
        thetas, grads = workers(rng, M, N, dtype)
        z = rng.standard_normal(N).astype(dtype)
        gram = fn.gram(grads)
        self.function = getattr(fn, name)
        self.arguments = {
            "step": {
                "thetas": thetas,
                "grads": grads,
                "lr": 0.5,
                "cutoff": 0.1,
                "max_rank": 2,
                "lr_rest": 0.1,
            }
            | {"lr_cap": "sigma", "nonfinite": "raise", "out": None},
            "apply_inverse": {
                "thetas": thetas,
                "grads": grads,
                "z": z,
                "cutoff": 0.1,
                "max_rank": 2,
                "out": None,
            },
            "gram": {"grads": grads, "z": z, "thetas": thetas, "precision": None},
            "spectrum": {"gram": gram, "cutoff": 0.1, "max_rank": 2},
            "combine": {
                "thetas": thetas,
                "grads": grads,
                "coefficients": np.ones(M),
                "lr": 0.5,
                "lr_rest": 0.1,
            }
            | {"precision": None, "out": None},
        }[name]
        if "out" in self.arguments:
            self.arguments["out"] = np.full(N, MARK, dtype)

    def __call__(self, **changed):
        return self.function(**{**self.arguments, **changed})

    def arrays(self):
        return {name: value for name, value in self.arguments.items() if isinstance(value, np.ndarray)}

    def refuses(self, argument, value, error, mention=None):
        """The call with one argument spoilt raises exactly `error`, names the argument and writes nothing."""
        before = {name: array.tobytes() for name, array in self.arrays().items()}
        with pytest.raises(error) as caught:
            self(**{argument: value})
        assert caught.type is error
        assert re.search(mention or rf"\b{argument}\b", str(caught.value)), str(caught.value)
        assert {name: array.tobytes() for name, array in self.arrays().items()} == before


FUNCTIONS = ["step", "apply_inverse", "gram", "spectrum", "combine"]


def having(argument):
    return [name for name in FUNCTIONS if argument in Call(name).arguments]


def cases(arguments, *tables):
    """Every function that has the argument, with every value of the tables."""
    return [
        pytest.param(function, argument, make, error, id=f"{function}-{argument}-{label}")
        for argument in arguments
        for function in having(argument)
        for error, table in tables
        for label, make in table.items()
    ]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_unspoilt_calls_work(function):
    call = Call(function)
    result = call()
    if "out" in call.arguments:
        assert (result[0] if function == "step" else result) is call.arguments["out"]
        assert (call.arguments["out"] != MARK).all()


# -- rows ----------------------------------------------------------------------------------------------------


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
    "1025 workers": lambda a: np.zeros((1025, N)),
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


@pytest.mark.parametrize(
    ("function", "argument", "make", "error"),
    cases(
        ["thetas", "grads"],
        (TypeError, NOT_AN_ARRAY),
        (TypeError, WRONG_DTYPE),
        (ValueError, WRONG_ROWS),
    ),
)
def test_bad_rows(function, argument, make, error):
    call = Call(function)
    call.refuses(argument, make(call.arguments[argument]), error)


@pytest.mark.parametrize(
    ("function", "argument", "make", "error"),
    cases(["thetas", "grads"], (TypeError, OTHER_DTYPE), (ValueError, WRONG_SHAPE)),
)
def test_rows_that_do_not_go_together(function, argument, make, error):
    call = Call(function)
    # Either argument may be the wrong one.
    call.refuses(argument, make(call.arguments[argument]), error, mention=r"\b(grads|thetas|z)\b")


@pytest.mark.parametrize("function", ["step", "apply_inverse", "combine"])
@pytest.mark.parametrize("argument", ["thetas", "grads"])
def test_rows_are_not_optional(function, argument):
    Call(function).refuses(argument, None, TypeError)


@pytest.mark.parametrize("argument", ["thetas", "grads"])
def test_message_says_how_to_make_a_copy(argument):
    for make in ("columns first", "every second column", "rows reversed", "one row repeated"):
        call = Call("step")
        call.refuses(argument, WRONG_ROWS[make](call.arguments[argument]), ValueError, mention="contiguous")


def test_message_says_how_to_make_good_of_bytes_that_are_misplaced():
    call = Call("step")
    call.refuses("grads", misaligned(call.arguments["grads"]), ValueError, mention=r"grads\.copy\(\)")
    call.refuses("grads", call.arguments["grads"].astype(">f8"), TypeError, mention=r"grads\.astype\('=f8'\)")


@pytest.mark.parametrize("m", [0, 1025, 5000])
def test_message_says_how_many_workers_there_may_be(m):
    call = Call("step")
    rows = np.zeros((m, 2))
    with pytest.raises(ValueError, match=r"\b1 to 1024\b"):
        call(thetas=rows, grads=rows)


def test_1024_workers_are_fine():
    rows = np.arange(1024.0)[:, None] * np.ones((1, 2))
    theta, info = fn.step(rows, rows, lr=1.0)
    assert info.rank == 1
    # H = I along the only direction seen: one step to the minimiser, and G's direction is all there is of ḡ.
    assert abs(theta).max() <= 1e-9


def test_an_unequal_dtype_within_a_sequence_is_a_type_error():
    call = Call("step")
    rows = call.arguments["grads"]
    call.refuses("grads", [rows[0], rows[1].astype(np.float32), rows[2]], TypeError)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uint16_is_not_taken_for_bfloat16(dtype):
    call = Call("step", DTYPES[dtype])
    call.refuses("grads", np.zeros((M, N), np.uint16), TypeError)


# -- z, coefficients, gram -----------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("function", "argument", "make", "error"),
    cases(
        ["z"],
        (TypeError, NOT_AN_ARRAY | WRONG_DTYPE | OTHER_DTYPE),
        (ValueError, WRONG_VECTOR | WRONG_STRIDES),
    ),
)
def test_bad_z(function, argument, make, error):
    call = Call(function)
    call.refuses(argument, make(call.arguments[argument]), error)


def test_z_of_apply_inverse_is_not_optional():
    Call("apply_inverse").refuses("z", None, TypeError)


@pytest.mark.parametrize(
    ("function", "argument", "make", "error"),
    cases(["coefficients"], (TypeError, NOT_AN_ARRAY | WRONG_DTYPE), (ValueError, WRONG_VECTOR)),
)
def test_bad_coefficients(function, argument, make, error):
    call = Call(function)
    call.refuses(argument, make(call.arguments[argument]), error)


@pytest.mark.parametrize(
    "value",
    [None, np.eye(3), "gram", (np.eye(3), np.ones(3)), fn.spectrum(fn.gram(np.ones((2, 3)))), fn.Gram],
    ids=["None", "matrix", "text", "tuple", "Spectrum", "class"],
)
def test_spectrum_takes_a_gram_only(value):
    Call("spectrum").refuses("gram", value, TypeError)


# -- out -----------------------------------------------------------------------------------------------------


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("function", "argument", "make", "error"),
    cases(
        ["out"],
        (TypeError, NOT_AN_ARRAY | WRONG_DTYPE | OTHER_DTYPE),
        (ValueError, WRONG_VECTOR | WRONG_STRIDES | {"read-only": read_only}),
    ),
)
def test_bad_out(function, argument, make, error):
    call = Call(function)
    out = make(call.arguments[argument])
    before = np.array(out).tobytes() if isinstance(out, np.ndarray) else None
    call.refuses(argument, out, error)
    assert before is None or np.array(out).tobytes() == before


@pytest.mark.parametrize("function", ["step", "apply_inverse", "combine"])
@pytest.mark.parametrize("argument", ["thetas", "grads", "z"])
@pytest.mark.parametrize("offset", [-N + 1, -1, 0, 1, N - 1])
@pytest.mark.parametrize("as_sequence", [False, True])
def test_out_that_overlaps_an_input(function, argument, offset, as_sequence):
    call = Call(function)
    if argument not in call.arguments:
        assert function != "apply_inverse"  # the only one that has z
        return
    rows = 1 if argument == "z" else M
    memory = np.full((rows + 2) * N, MARK)
    inner = memory[N:-N].reshape(rows, N)
    inner[...] = call.arguments[argument]
    call.arguments[argument] = inner[0] if argument == "z" else list(inner) if as_sequence else inner
    last = N + (rows - 1) * N  # where the last row begins
    before = memory.tobytes()
    call.refuses("out", memory[last + offset : last + offset + N], ValueError, mention="out.*overlap")
    assert memory.tobytes() == before
    beside = memory[last + N :]
    result = call(out=beside)
    assert (result[0] if function == "step" else result) is beside


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_out_of_other_libraries(library):
    module = pytest.importorskip(library)
    thetas, grads = workers(np.random.default_rng(2), M, N, np.float32)
    make = module.tensor if library == "torch" else module.numpy.asarray
    inputs = make(thetas), make(grads)
    if library == "jax":
        out = module.numpy.full(N, MARK)
        bad = {TypeError: [out]}
    else:
        out = module.full((N,), MARK)
        strided = module.full((2 * N,), MARK)[::2]
        bad = {
            TypeError: [out.double(), out.int(), out.half(), out.bfloat16()],
            ValueError: [strided, out[:-1], out[None], module.full((), MARK), inputs[0][1], inputs[1][2]],
        }
    before = [np.asarray(array).tobytes() for array in inputs]
    for error, values in bad.items():
        for value in values:
            with pytest.raises(error, match=r"\bout\b"):
                fn.step(*inputs, lr=0.5, out=value)
    assert (np.asarray(out) == MARK).all()
    assert [np.asarray(array).tobytes() for array in inputs] == before


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_rows_of_other_libraries(library):
    module = pytest.importorskip(library)
    thetas, _ = workers(np.random.default_rng(2), M, N, np.float32)
    make = module.tensor if library == "torch" else module.numpy.asarray
    good = make(thetas)
    odd = {
        TypeError: [make(np.ones((M, N), dtype)) for dtype in (np.int32, np.int16, np.uint8, np.bool_, np.complex64)],
        ValueError: [
            good[0],
            good[None],
            good[:0],
            make(np.ones((1025, 1), np.float32)),
            make(np.float32(1.0)),
        ],
    }
    if library == "torch":
        odd[TypeError] += [module.nn.Linear(2, 2), module.Generator(), module.float32]
        odd[ValueError] += [make(thetas.T.copy()).T, make(np.ones((M, 2 * N), np.float32))[:, ::2]]
        odd[ValueError] += [good[:1].expand(M, N)]
    else:
        odd[TypeError] += [module.ShapeDtypeStruct((M, N), np.float32), module.numpy.float32]
    for error, values in odd.items():
        for value in values:
            for argument in ("thetas", "grads"):
                with pytest.raises(error, match=rf"\b{argument}\b"):
                    fn.step(**{"thetas": good, "grads": good, argument: value}, lr=0.5)


# -- numbers and words ---------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("function", "argument", "make", "error"),
    [
        *cases(["lr", "lr_rest"], (TypeError, NOT_A_NUMBER), (ValueError, NOT_FINITE | NEGATIVE)),
        *cases(["lr"], (TypeError, NONE)),
        *cases(["cutoff"], (TypeError, NOT_A_NUMBER | NONE), (ValueError, NOT_FINITE | NEGATIVE | NOT_A_FRACTION)),
        *cases(["max_rank"], (TypeError, NOT_AN_INTEGER), (ValueError, NEGATIVE_INTEGER)),
        *cases(["lr_cap", "nonfinite", "precision"], (TypeError, NOT_A_WORD), (ValueError, UNKNOWN_WORD)),
        *cases(["nonfinite"], (TypeError, NONE)),
    ],
)
def test_bad_options(function, argument, make, error):
    Call(function).refuses(argument, make(None), error)


@pytest.mark.parametrize("function", ["step", "combine"])
def test_lr_must_be_given(function):
    call = Call(function)
    del call.arguments["lr"]
    with pytest.raises(TypeError, match=r"\blr\b"):
        call()
    assert (call.arguments["out"] == MARK).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_options_are_keywords_only(function):
    call = Call(function)
    positional = {"step": 2, "apply_inverse": 3, "gram": 2, "spectrum": 1, "combine": 3}[function]
    values = list(call.arguments.values())
    with pytest.raises(TypeError, match="positional"):
        call.function(*values[: positional + 1])
    with pytest.raises(TypeError, match="learning_rate"):
        call(learning_rate=0.5)


# -- generated -----------------------------------------------------------------------------------------------


@given(st.sampled_from(["lr", "lr_rest"]), st.floats(max_value=0, exclude_max=True))
def test_any_negative_length_is_refused(argument, value):
    Call("step").refuses(argument, value, ValueError)


@given(st.sampled_from(["step", "apply_inverse", "spectrum"]), st.floats())
def test_any_cutoff_outside_0_and_1_is_refused(function, value):
    assume(not 0 < value < 1)
    Call(function).refuses("cutoff", value, ValueError)


@given(st.sampled_from(["step", "apply_inverse", "spectrum"]), st.integers(max_value=-1))
def test_any_negative_max_rank_is_refused(function, value):
    Call(function).refuses("max_rank", value, ValueError)


@given(st.sampled_from(["lr_cap", "nonfinite"]), st.text())
def test_any_other_word_is_refused(argument, word):
    assume(word not in {"sigma", "curvature", "raise", "drop", "propagate"})
    Call("step").refuses(argument, word, ValueError)


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@given(shapes, shapes, st.sampled_from(list(DTYPES.values())))
def test_any_shapes_either_work_or_are_value_errors(first, second, dtype):
    thetas, grads = np.ones(first, dtype), np.ones(second, dtype)
    fits = first == second and len(first) == 2 and first[0] > 0
    if fits:
        assert fn.step(thetas, grads, lr=0.5)[0].shape == first[1:]
        return
    with pytest.raises(ValueError, match=r"thetas|grads"):
        fn.step(thetas, grads, lr=0.5)
    with pytest.raises(ValueError, match=r"thetas|grads"):
        fn.gram(grads, thetas=thetas)


@given(st.integers(0, 50), st.integers(0, 50))
def test_any_out_of_another_length_is_refused(n, length):
    assume(n != length)
    rows, out = np.ones((2, n)), np.full(length, MARK)
    with pytest.raises(ValueError, match=r"\bout\b"):
        fn.step(rows, rows, lr=0.5, out=out)
    assert (out == MARK).all()


scalars = st.one_of(st.none(), st.booleans(), st.text(), st.binary(), st.complex_numbers(), st.floats(), st.integers())
nested = st.recursive(scalars, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=5)


@given(st.sampled_from(["thetas", "grads"]), nested)
def test_python_objects_are_never_taken_for_arrays(argument, value):
    Call("step").refuses(argument, value, TypeError)
