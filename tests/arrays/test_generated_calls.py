"""Generated calls of the whole public API, whose arguments are good, odd or bad.

What was made good must work, read where it lies; what was made bad must be refused by an error of its own kind.  In
all cases: no other exception, no hang, no input changed, and `out` untouched by an error.
"""

import dataclasses
import faulthandler
import re
from typing import NamedTuple

import numpy as np
import pytest
from array_libraries import INSTALLED, Capsule, Library
from generated import (
    OPTIONS,
    Given,
    Shape,
    bad_alone,
    bad_lengths,
    bad_out,
    choices,
    good,
    good_out,
    good_vector,
    lengths,
    shapes,
    unlike,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import DTYPES
from reads import reads
from reference import eps_of

import fastnewton as fn
from fastnewton.server import ParameterServer

LIMIT = 120  # seconds for one call, compiling on a busy machine included: a longer one hangs
ARGUMENTS = {
    "step": ("thetas", "grads", "lr", "cutoff", "max_rank", "lr_rest", "lr_cap", "nonfinite", "safeguards", "out"),
    "apply_inverse": ("thetas", "grads", "z", "cutoff", "max_rank", "out"),
    "gram": ("grads", "z", "thetas", "precision"),
    "spectrum": ("gram", "cutoff", "max_rank"),
    "combine": ("thetas", "grads", "coefficients", "lr", "lr_rest", "precision", "out"),
    "diagnostics": ("gram", "spectrum"),
    "Safeguards": ("min_cosine", "max_coefficient", "curvature", "max_newton_norm", "fallback_lr"),
}
# Plain runs make 500 calls in all, of few kernels; the long one 10,000.
FEW = {"sizes": (3,), "dtypes": ("float32", "float64")}
MANY = {"sizes": (1, 2, 3, 5, 8, 17, 33), "dtypes": tuple(DTYPES)}


def counts(few, many):
    plain_run, long_run = pytest.param(few, FEW, id="few"), pytest.param(many, MANY, id="many", marks=pytest.mark.full)
    return pytest.mark.parametrize(("examples", "kinds"), [plain_run, long_run])


pytestmark = pytest.mark.usefixtures("x64")


def generate(examples, strategy, check):
    """Check so many generated cases, both of which kinds must be among them; `check` says of each which it was."""
    made = []
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(max_examples=examples, suppress_health_check=slow)
    @given(strategy)
    def every(case):
        made.append(bool(check(case)))

    every()
    assert len(made) >= examples
    assert 0.2 <= np.mean(made) <= 0.8


# -- what is asked of any call -------------------------------------------------------------------------------


def library_of(value):
    found = map(Library, INSTALLED)
    return next((library for library in found if library.is_array(value)), None)


def contents(value):
    """The bits of an array, or of all arrays of a sequence."""
    if isinstance(value, Capsule):
        return contents(value._array)
    if isinstance(value, (list, tuple)):
        return [contents(each) for each in value]
    library = library_of(value)
    return library and library.bits(value)


def plain(value):
    """The same argument as contiguous NumPy arrays."""
    if isinstance(value, Capsule):
        return plain(value._array)
    if isinstance(value, (list, tuple)):
        return np.array([plain(each) for each in value])
    library = library_of(value)
    if library is None:
        return value
    dtype = DTYPES[str(value.dtype).removeprefix("torch.")]
    return np.frombuffer(library.bits(value), dtype).reshape(tuple(value.shape))


def nonfinite_rows(*matrices):
    """The workers that are not finite."""
    spoilt = [~np.isfinite(plain(each).astype(np.float64)).all(axis=-1) for each in matrices]
    return tuple(np.flatnonzero(np.logical_or.reduce(spoilt)).tolist())


def errors_of(arguments):
    return frozenset().union(*(each.errors for each in arguments.values()))


def called(task, arguments):
    """What the task returns, or the error by which it refuses, in which case nothing that it was given has changed."""
    values = {name: each.value for name, each in arguments.items()}
    before = {name: contents(value) for name, value in values.items()}
    result, refusal = None, None
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        result = task(**values)
    except (TypeError, ValueError, fn.NonFiniteError) as error:
        refusal = error
    finally:
        faulthandler.cancel_dump_traceback_later()
    if isinstance(refusal, (TypeError, ValueError)) or errors_of(arguments):
        assert type(refusal) in errors_of(arguments), f"{refusal!r}, not one of {errors_of(arguments)}"
        assert any(re.search(rf"\b{name}\b", str(refusal)) for name in arguments), refusal
    # θ that is not finite is found while `out` is being written.
    theta = values.get("thetas", values.get("theta"))
    may_change = refusal is None or (isinstance(refusal, fn.NonFiniteError) and nonfinite_rows(theta))
    kept = [name for name in values if name != "out" or not may_change]
    assert {name: contents(values[name]) for name in kept} == {name: before[name] for name in kept}
    return result, refusal


def expect_array(result, known, shape, out):
    """The result has these bits and is of the caller's kind, or is `out` itself."""
    assert out is None or result is out
    found = result._array if isinstance(result, Capsule) else result
    if shape.library == "capsule" and out is None:
        found = np.from_dlpack(found)
    assert shape.side.is_array(found)
    assert shape.side.bits(found) == known.tobytes()


# -- functions -----------------------------------------------------------------------------------------------


class Call(NamedTuple):
    function: str
    shape: Shape
    arguments: dict[str, Given]


@st.composite
def calls(draw, sizes, dtypes):
    function = draw(st.sampled_from(list(ARGUMENTS)))
    names = ARGUMENTS[function]
    spoilt = draw(st.just(set()) | st.sets(st.sampled_from(names), min_size=1, max_size=3))
    shape = draw(shapes(sizes, dtypes))
    if spoilt:  # a shape for which all is bad that is meant to be
        shape = shape._replace(m=3, n=draw(st.integers(8, 60)))
    return Call(function, shape, {name: draw(choices(name, shape, function)[name in spoilt]) for name in names})


def check_call(call):
    function, arguments = getattr(fn, call.function), call.arguments
    with reads() as seen:
        result, refusal = called(function, arguments)
    if call.function == "step" and not errors_of(arguments):
        lost = nonfinite_rows(arguments["thetas"].value, arguments["grads"].value)
        choice = arguments["nonfinite"].value
        if lost and (choice == "raise" or (choice == "drop" and len(lost) == call.shape.m)):
            assert isinstance(refusal, fn.NonFiniteError)
            assert refusal.workers == lost
            return True
    if refusal:
        assert isinstance(refusal, (TypeError, ValueError)), repr(refusal)
        return True
    if call.shape.n:
        for name, table in seen.items():  # θ may be read for the first time when workers were dropped
            rows = arguments[name].rows
            assert not rows or table == rows or (name == "thetas" and set(table) < set(rows)), f"{name} was copied"
    if call.function == "Safeguards":
        assert {name: getattr(result, name) for name in arguments} == {k: each.value for k, each in arguments.items()}
        return False
    known = function(**{name: plain(each.value) for name, each in arguments.items() if name != "out"})
    if call.function in ("gram", "spectrum", "diagnostics"):
        assert fields(result) == fields(known)
        return False
    if call.function == "step":
        (result, info), (known, known_info) = result, known
        assert info.record.tobytes() == known_info.record.tobytes()
        assert info.dropped == known_info.dropped == (lost if choice == "drop" else ())
    expect_array(result, known, call.shape, arguments["out"].value)
    return False


def fields(result):
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    tell = values.pop("tell", None)
    values |= dataclasses.asdict(tell()) if tell else {}
    return {name: np.asarray(value).tobytes() for name, value in values.items() if value is not None}


@counts(few=300, many=6000)
def test_functions(examples, kinds):
    generate(examples, calls(**kinds), check_call)


# -- objects -------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """The arguments of an object, and what is then asked of it."""

    shape: Shape
    arguments: dict[str, Given]
    requests: list[tuple[str, dict[str, Given]]]


def spoilt_once(draw, table):
    """One value for each argument, of which half of the times one is bad."""
    spoilt = draw(st.none() | st.sampled_from(list(table)))
    return {name: draw(pair[name == spoilt]) for name, pair in table.items()}


def options(*names):
    return {name: OPTIONS[name] for name in names}


def vectors(shape):
    return {
        "theta": (good_vector(shape), bad_alone(shape) | unlike(shape, shape.n)),
        "grad": (good_vector(shape), bad_alone(shape)),
    }


def refused(error, *values):
    return st.sampled_from([Given(value, frozenset({error})) for value in values])


counted, uncounted = OPTIONS["max_rank"]
STATE = ["mode", "dtype", "version", "info", "dropped", "theta", "thetas", "grads", "versions"]


@st.composite
def servers(draw, sizes, dtypes):
    shape = draw(shapes(sizes, dtypes))._replace(n=draw(st.integers(8, 60)))
    table = options("mode", "lr", "cutoff", "max_rank", "lr_rest", "lr_cap")
    table |= {
        "theta0": (good_vector(shape), bad_alone(shape)),
        "workers": (good(st.integers(1, 3)), uncounted | refused(ValueError, None, 0, 1025)),
        "max_staleness": (counted, uncounted),
    }
    arguments = spoilt_once(draw, table)
    for mode, name, harmless in (("sync", "max_staleness", [None]), ("async", "lr_cap", [None, "sigma"])):
        chosen = arguments[name]
        if arguments["mode"] == Given(mode) and chosen.value not in harmless:
            arguments[name] = chosen._replace(errors=chosen.errors | {ValueError})
    m = 1 if errors_of(arguments) else arguments["workers"].value
    table = {
        "write": {"worker": (good(st.integers(0, m - 1)), uncounted | refused(ValueError, None, m)), **vectors(shape)},
        "read": {"after": (good(st.none()), uncounted)},
        "load_state_dict": {
            "entry": (good(st.sampled_from(STATE)),) * 2,
            "value": (good(st.sampled_from(["x", 0.5, -1, 1j, np.ones((3, 3)), [1]])),) * 2,
        },
    }
    names = draw(st.lists(st.sampled_from(["write", "write", "write", "read", "load_state_dict"]), max_size=6))
    return Use(shape, arguments, [(name, spoilt_once(draw, table[name])) for name in names])


def state_of(server):
    state = server.state_dict()
    return {name: contents(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}


def check_server(use):
    """A Write is an update or the end of a part of a round; what is refused changes nothing."""
    server, refusal = called(ParameterServer, use.arguments)
    in_round, m = set(), use.arguments["workers"].value
    for name, arguments in use.requests if server else ():
        before, version = state_of(server), server.version
        if name == "load_state_dict":
            with pytest.raises((TypeError, ValueError), match=r"\bstate\b"):
                server.load_state_dict(server.state_dict() | {arguments["entry"].value: arguments["value"].value})
            assert state_of(server) == before
            continue
        again = name == "write" and not arguments["worker"].errors and arguments["worker"].value in in_round
        if again and use.arguments["mode"].value == "sync":
            again = arguments["worker"]
            arguments["worker"] = again._replace(errors=again.errors | {ValueError})
        result, error = called(getattr(server, name), arguments)
        if name == "write" and not errors_of(arguments):
            k = arguments["worker"].value
            if nonfinite_rows(arguments["theta"].value, arguments["grad"].value):
                assert error.workers == (k,)
            elif error is None:
                in_round = (in_round | {k}) if use.arguments["mode"].value == "sync" else set(range(m))
                assert result == server.version == version + (len(in_round) == m)
                in_round = in_round if len(in_round) < m else set()
            else:
                assert error.workers == ()  # an overflow, of which float16 is capable here
                assert use.shape.dtype == "float16"
        if error or name == "read":
            assert state_of(server) == before
    return refusal


@counts(few=100, many=2000)
def test_servers(examples, kinds):
    generate(examples, servers(**kinds), check_server)


@st.composite
def newtons(draw, sizes, dtypes):
    from mpi4py import MPI

    shape = draw(shapes(sizes, dtypes))._replace(n=draw(st.integers(8, 60)))
    table = options("lr", "cutoff", "max_rank", "lr_rest", "lr_cap", "nonfinite", "safeguards", "exchange")
    no_comm = refused(TypeError, None, 0, "world", MPI, MPI.COMM_NULL) | refused(ValueError, MPI.Intracomm())
    arguments = spoilt_once(draw, table | {"comm": (good(st.just(MPI.COMM_SELF)), no_comm)})
    table = {
        **vectors(shape),
        "lr": (good(lengths, st.none()), bad_lengths),
        "out": (good_out(shape), bad_out(shape)),
    }
    return Use(shape, arguments, [("step", spoilt_once(draw, table)) for _ in range(draw(st.integers(1, 4)))])


def check_newton(use):
    """A step is that of one worker or is refused, and the object can be used after it."""
    newton, refusal = called(fastnewton_mpi().DistNewton, use.arguments)
    settings_of_step = {name: use.arguments[name].value for name in ARGUMENTS["step"] if name in use.arguments}
    for _, arguments in use.requests if newton else ():
        result, error = called(newton.step, arguments)
        if errors_of(arguments):
            assert str(error).startswith("rank 0: ")
            continue
        theta, grad = (plain(arguments[name].value)[None] for name in ("theta", "grad"))
        if nonfinite_rows(theta, grad) and settings_of_step["nonfinite"] != "propagate":
            assert error.workers == (0,)
            continue
        assert error is None
        lr = arguments["lr"].value
        known, known_info = fn.step(theta, grad, **settings_of_step | ({} if lr is None else {"lr": lr}))
        expect_array(result[0], known, use.shape, arguments["out"].value)
        assert result[1].record.tobytes() == known_info.record.tobytes()
    if newton:
        newton.close()
    return refusal


@st.composite
def optimizers(draw, sizes, dtypes):
    """Of a worker alone."""
    import torch

    shape = Shape("torch", draw(st.sampled_from(dtypes)), 1, draw(st.integers(1, 60)))
    table = options("lr", "lr_rest", "cutoff", "nonfinite", "safeguards")
    table |= {
        "params": (
            st.builds(lambda: Given([shape.side.make(shape.ones(2, shape.n)), shape.side.make(shape.ones(3))])),
            refused(TypeError, [torch.ones(2, dtype=torch.int32)], [torch.ones(2), torch.ones(2).double()]),
        ),
        "local_lr": OPTIONS["lr_rest"],
        "local_steps": (good(st.integers(2, 1 << 40)), uncounted | refused(ValueError, 0)),  # 1 is right with a spread
        "spread": (good(st.none(), lengths), bad_lengths),
    }
    return Use(shape, spoilt_once(draw, table), [])


def check_optimizer(use):
    """The first step of one that was not refused is SGD with the step length of local steps, or lr."""
    from fastnewton.torch import DistNewton

    optimizer, refusal = called(DistNewton, use.arguments)
    if optimizer:
        params, lr, local_lr = (use.arguments[name].value for name in ("params", "lr", "local_lr"))
        for p in params:
            p.grad = p.clone()
        optimizer.step()
        # 1 − lr, with the rounding of lr and of a product and a sum.
        eps = eps_of(DTYPES[use.shape.dtype])
        expected = 1 - float(lr if local_lr is None else local_lr)
        assert all(abs(p.double() - expected).max() <= 2 * eps * (1 + abs(expected)) for p in params)
    return refusal


@counts(few=100, many=2000)
def test_optimizers(examples, kinds):
    pytest.importorskip("torch")
    generate(examples, optimizers(**kinds), check_optimizer)


def fastnewton_mpi():
    import fastnewton.mpi

    return fastnewton.mpi


@counts(few=100, many=2000)
def test_mpi_objects(examples, kinds):
    pytest.importorskip("mpi4py", exc_type=ImportError)
    generate(examples, newtons(**kinds), check_newton)
