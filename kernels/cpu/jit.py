"""Numba functions compiled for literal arguments and cached on disk; all that touches Numba's private parts."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import caching, config, event, registry
from numba.extending import intrinsic as numba_intrinsic

from fastnewton.kernels.cpu.cache import cache_folder, one_process_at_a_time

INT, FLOAT = types.int64, types.float64
FLOATS = types.Array(types.float64, 1, "C")
INTS = types.Array(types.int64, 1, "C")
FLOATS_2D, INTS_2D = types.Array(types.float64, 2, "C"), types.Array(types.int64, 2, "C")

_settings: Any = config  # its names are made at run time
_njit: Any = numba.njit
intrinsic: Any = numba_intrinsic  # what it makes is called without the typing context
_target: Any = registry.cpu_target.target_context
_triple, _cpu, _features = _target.codegen().magic_tuple()  # Numba may compile for less than the host has
CPU_FEATURES = frozenset(flag[1:] for flag in _features.split(",") if flag.startswith("+"))
CACHE_FOLDER = cache_folder(f"numba{numba.__version__}", _triple + _cpu + _features, _settings.CACHE_DIR)

_in_process = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child forked while another thread compiles would find Numba's own lock taken
    os.register_at_fork(
        before=_in_process.acquire, after_in_parent=_in_process.release, after_in_child=_in_process.release
    )


def jit(function: Callable) -> Any:
    """Let Numba compile `function`, and keep the machine code of kernels in the cache folder.

    For compiled code and `call`: what Python calls is an `entry`, since wrappers take a fifth of the compile time.
    """
    return _dispatcher(function, _KernelCache, no_cpython_wrapper=True)


def _dispatcher(function: Callable, cache: Any, **options: bool) -> Any:
    # With NumPy's error model a division by zero is no exception.
    dispatcher = _njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options)(function)
    has_compiler = dispatcher is not function  # else `_compiled` asks for it
    # The folder's name has the digest of the package's own sources only.
    if has_compiler and CACHE_FOLDER and function.__module__.startswith("fastnewton."):
        dispatcher._cache = cache(function)
    return dispatcher


_CacheLocator: Any = caching._CacheLocator


class _Locator(_CacheLocator):
    """Tells Numba where compiled code is; one folder holds one build, so nothing in it is ever out of date."""

    def __init__(self, function: Callable):
        self._line, self._py_file = function.__code__.co_firstlineno, function.__code__.co_filename

    def get_cache_path(self) -> str:
        return str(CACHE_FOLDER)

    def get_source_stamp(self) -> str:
        return ""

    def get_disambiguator(self) -> str:
        return str(self._line)


class _KernelCacheImpl(caching.CompileResultCacheImpl):
    # Without super(), which wants to see the source file and obeys NUMBA_CACHE_LOCATOR_CLASSES.
    def __init__(self, function: Callable):
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(function)
        self._filename_base = self.get_filename_base(f"{function.__module__}.{function.__qualname__}", "")


class _EntryCacheImpl(_KernelCacheImpl):
    def __init__(self, function: Callable):
        super().__init__(function)
        self._filename_base += ".entry"


class _KernelCache(caching.FunctionCache):
    _impl_class = _KernelCacheImpl

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason not to run what was compiled
            super().save_overload(sig, data)


class _EntryCache(_KernelCache):
    _impl_class = _EntryCacheImpl


def entry(function: Any, *arguments: types.Type) -> Callable:
    """Return what Python calls `function` by, compiled for these types when it is first called; it checks nothing."""
    compiled = cache(
        lambda: _compiled(_dispatcher(getattr(function, "py_func", function), _EntryCache), arguments).entry_point
    )
    return lambda *values: compiled()(*values)


@cache
def code_address(function: Any, *signature: types.Type) -> int:
    """Return the address of the machine code of `function` for these types, for `call`."""
    with _in_process:  # LLVM's own lock must not be held when another thread forks
        compiled = _compiled(function, signature)
        return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


def _compiled(function: Any, signature: tuple[types.Type, ...]) -> Any:
    if _settings.DISABLE_JIT:
        raise RuntimeError("fastnewton's kernels need Numba's compiler: unset NUMBA_DISABLE_JIT")
    with _in_process, one_process_at_a_time(CACHE_FOLDER):
        function.compile(signature)
    return function.overloads[signature]


@contextlib.contextmanager
def compile_times() -> Iterator[dict[str, float]]:
    """Record the seconds that compiling each function takes, without those of the functions that it calls."""
    seconds: dict[str, float] = {}
    with event.install_listener("numba:compile", _CompileTimes(seconds)):
        yield seconds


class _CompileTimes(event.Listener):
    def __init__(self, seconds: dict[str, float]):
        self._seconds, self._running, self._since = seconds, [], 0.0

    def on_start(self, event: Any) -> None:
        self._charge()
        self._running.append(event.data["dispatcher"].py_func)

    def on_end(self, event: Any) -> None:
        self._charge()
        self._running.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            function = self._running[-1]
            name = f"{function.__module__}.{function.__qualname__}"
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


# -- in compiled code -----------------------------------------------------------------------------------------------


@intrinsic
def address(typingctx, array):
    """Return the address of an array's first item; ndarray.ctypes takes longer to compile."""

    def emit(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return INT(array), emit


@intrinsic
def call(typingctx, code, *arguments):
    """Call the machine code at a `code_address` with integers; return its integer, 0 of none, or −1 if it raised.

    Numba's convention: result and exception through pointers, then the arguments; those left out are never read.
    """

    def emit(context, builder, signature, args):
        word, status = ir.IntType(64), ir.IntType(32)
        with builder.goto_entry_block():
            result, error = builder.alloca(word), builder.alloca(word)
        builder.store(word(0), result)
        kind = ir.FunctionType(status, [result.type, error.type] + [word] * len(arguments))
        values = [builder.extract_value(args[1], k) for k in range(len(arguments))]
        failed = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [result, error, *values])
        return builder.select(builder.icmp_signed("==", failed, status(0)), builder.load(result), word(-1))

    packed: Any = types.StarArgTuple.from_types(arguments)
    return INT(code, packed), emit
