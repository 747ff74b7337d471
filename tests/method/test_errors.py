"""Bad input: the type of the error, the name of the argument in its message, and nothing written."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import assume, given
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
    OTHER_DTYPE,
    UNKNOWN_WORD,
    WRONG_DTYPE,
    WRONG_ROWS,
    WRONG_SHAPE,
    WRONG_STRIDES,
    WRONG_VECTOR,
    misaligned,
    nested,
    read_only,
)
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


@given(st.sampled_from(["thetas", "grads"]), nested)
def test_python_objects_are_never_taken_for_arrays(argument, value):
    Call("step").refuses(argument, value, TypeError)


# -- what stops the eigenproblem ----------------------------------------------------------------------------------


CAPPED, GUARDED = {"lr_cap": "curvature"}, {"safeguards": fn.Safeguards()}


@pytest.mark.parametrize(("options", "calls"), [({}, 1), (CAPPED, 1), (CAPPED, 2), (GUARDED, 1), (GUARDED, 2)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, np.linalg.LinAlgError, MemoryError])
def test_what_stops_lapack_reaches_the_caller(rng, monkeypatch, options, calls, error):
    """An interrupt within a call from compiled code is no reason for another step."""
    thetas = rng.standard_normal((130, 200))
    grads = thetas * np.geomspace(0.1, 1, 200)
    eigh, count = np.linalg.eigh, itertools.count(1)

    def stopped(matrix):
        if next(count) == calls:
            raise error("stopped")
        return eigh(matrix)

    out = np.zeros(200)
    monkeypatch.setattr(np.linalg, "eigh", stopped)
    with pytest.raises(error, match="stopped"):
        fn.step(thetas, grads, lr=0.5, out=out, **options)
    assert not out.any()
    monkeypatch.undo()
    assert fn.step(thetas, grads, lr=0.5, **options)[1].accepted


def test_spectrum_looks_at_the_gradients_alone(rng):
    gram = fn.gram(rng.standard_normal((5, 60)), thetas=rng.standard_normal((5, 60)))
    odd = dataclasses.replace(gram, cross_projection=[1.0] * 5)
    np.testing.assert_array_equal(fn.spectrum(odd).coefficients, fn.spectrum(gram).coefficients)
