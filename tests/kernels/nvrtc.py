"""NVRTC by ctypes: what a kernel takes of a GPU, from the compiler's log, without a driver."""

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
    """Of one kernel: registers of a thread, bytes spilled to memory, static shared memory of a block."""

    registers: int
    spilled: int
    shared: int


class CompileError(Exception):
    """What the compiler says about a source."""


def is_expected():
    """Whether this is a platform for which the `test` extra brings the compiler."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@cache
def _folder():
    found = importlib.util.find_spec("nvidia")
    places = [Path(place) / "cu13" for place in found.submodule_search_locations] if found else []
    return next(place for place in places if (place / "lib").is_dir())


@cache
def _library():
    return ctypes.CDLL(str(next((_folder() / "lib").glob("libnvrtc.so.*"))))


@cache
def release():
    """Major and minor version of the compiler."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_source(text, name, options, architecture):
    """Compile for an architecture, such as "sm_90" or "compute_120"; {kernel: Used}, empty for virtual ones."""
    library, program = _library(), ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None))
    # CuPy always adds -ftz=true.
    given = [f"-arch={architecture}", "--ptxas-options=-v", f"-I{_folder() / 'include'}", "-ftz=true", *options]
    words = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    try:
        code = library.nvrtcCompileProgram(program, len(given), words)
        size = ctypes.c_size_t()
        _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetProgramLog(program, log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    said = log.value.decode()
    if code:
        raise CompileError(f"{name} for {architecture} with {' '.join(options)}\n{said}")
    found = {}
    for kernel, spilled, registers, rest in ENTRY.findall(said):
        shared = SHARED.search(rest)
        found[kernel] = Used(int(registers), int(spilled), int(shared[1]) if shared else 0)
    return found


def _check(code):
    if code:
        raise RuntimeError(f"NVRTC answers {code}")
