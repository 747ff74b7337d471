"""NVRTC through ctypes: a kernel's registers, spills and shared memory from the compiler's log, without a driver."""

import ctypes
import importlib.util
import platform
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

ENTRY = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)", re.S)
SHARED = re.compile(r"(\d+) bytes smem")


class Used(NamedTuple):
    """Resources of a kernel: registers and spilled bytes per thread, static shared memory per block."""

    registers: int
    spilled: int
    shared: int


class CompileError(Exception):
    """The compiler's log of a source that does not compile."""


def is_expected():
    """Tell whether the `test` extra brings the compiler to this platform."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@cache
def _folder():
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(location) / "cu13" for location in spec.submodule_search_locations] if spec else []
    return next(folder for folder in folders if (folder / "lib").is_dir())


@cache
def _library():
    return ctypes.CDLL(str(next((_folder() / "lib").glob("libnvrtc.so.*"))))


@cache
def release():
    """Return the version of the compiler, major.minor."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_source(text, name, options, architecture):
    """Compile for an architecture, such as "sm_90" or "compute_120"; {kernel: Used}, empty for virtual ones."""
    library, program = _library(), ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None))
    # CuPy always adds -ftz=true.
    arguments = [f"-arch={architecture}", "--ptxas-options=-v", f"-I{_folder() / 'include'}", "-ftz=true", *options]
    array = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
    try:
        code = library.nvrtcCompileProgram(program, len(arguments), array)
        size = ctypes.c_size_t()
        _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetProgramLog(program, buffer))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    log = buffer.value.decode()
    if code:
        raise CompileError(f"{name} for {architecture} with {' '.join(options)}\n{log}")
    used = {}
    for kernel, spilled, registers, rest in ENTRY.findall(log):
        shared = SHARED.search(rest)
        used[kernel] = Used(int(registers), int(spilled), int(shared[1]) if shared else 0)
    return used


def _check(code):
    if code:
        raise RuntimeError(f"NVRTC answers {code}")
