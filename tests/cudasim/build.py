"""From a .cu file to a shared library, compiled once and kept in a cache."""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
CACHE = HERE / ".cache"

BASE = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
SANITIZER = {
    None: [],
    "address": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
    "thread": ["-g1", "-fsanitize=thread"],
}
# The compiler must not make calls of memcpy or memset out of the scheduler's loops: sanitizers intercept them.
SCHEDULER = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-tree-loop-distribute-patterns"]

# A kernel once its source is preprocessed: __global__ has become the attribute.
KERNEL = re.compile(r"__attribute__\(\(used\)\)\s+void\s+(\w+)\s*\(([^)]*)\)")


class CompileError(Exception):
    """What g++ says about a kernel's source."""


def why_unavailable():
    """The reason for which nothing can be compiled here, None where it can."""
    if platform.system() != "Linux":
        return "the CUDA simulator needs Linux"
    return None if shutil.which("g++") else "g++ not found"


@dataclass(frozen=True)
class Source:
    """What is compiled: a file or its text, the options, the sanitizer."""

    path: Path | None = None
    code: str | None = None
    options: tuple[str, ...] = ()
    sanitize: str | None = None

    def __post_init__(self):
        if (self.path is None) == (self.code is None):
            raise TypeError("give either a path or code")
        if self.sanitize not in SANITIZER:
            raise ValueError(f"sanitize is one of {', '.join(map(repr, SANITIZER))}, not {self.sanitize!r}")

    @property
    def name(self):
        """What reports call the source."""
        return "kernel.cu" if self.path is None else str(self.path.resolve())

    @property
    def text(self):
        return self.path.read_text() if self.code is None else self.code

    @property
    def flags(self):
        """The options that mean something to g++; the others are about GPUs."""
        return [option for option in self.options if option.startswith(("-D", "-U", "-I"))]

    @property
    def include_folders(self):
        beside = [] if self.path is None else [self.path.resolve().parent]
        return beside + [Path(flag[2:]) for flag in self.flags if flag.startswith("-I")]

    @functools.cached_property
    def digest(self):
        given = [self.name, self.text, self.flags, self.sanitize]
        headers = [p for folder in self.include_folders for p in sorted(folder.iterdir()) if p.suffix in (".cuh", ".h")]
        return digest([compiler_version(), simulator_digest(), *given, *((str(p), p.read_bytes()) for p in headers)])

    def build(self):
        """The path of the compiled library."""
        library = CACHE / f"{self.digest}.so"
        if not library.exists():
            with finished_as(library) as unfinished:
                self._compile(unfinished)
        return library

    def _compile(self, library):
        command = ["g++", *BASE, *SANITIZER[self.sanitize]]
        folders = [f"-I{folder}" for folder in (INCLUDE, *self.include_folders)]
        text = run([*command, "-E", *folders, "-x", "c++", "-"], self._input())
        text += '\n# 1 "<kernels>"\n' + "\n".join(map(describe, kernels(text)))
        run([*command, "-x", "c++-cpp-output", "-", "-x", "none", scheduler(), "-shared", "-o", library], text)

    def _input(self):
        """The source after the simulator's header, which the macros given as options must not reach."""
        macros = [directive(flag) for flag in self.flags if not flag.startswith("-I")]
        return "\n".join(['#include "cudasim.h"', *macros, f'#line 1 "{self.name}"', self.text])


def directive(flag):
    """The line that does what -D or -U would do."""
    name, _, value = flag[2:].partition("=")
    if flag.startswith("-U"):
        return f"#undef {name}"
    return f"#define {name} {value if '=' in flag else 1}"


def kernels(preprocessed):
    """The kernels' names and parameters."""
    without_line_markers = re.sub(r"(?m)^#.*$", "", preprocessed)
    return [(name, " ".join(text.split())) for name, text in dict(KERNEL.findall(without_line_markers)).items()]


def describe(kernel):
    """The C++ by which the library tells of a kernel."""
    name, parameters = kernel
    return (
        f'extern "C" __attribute__((visibility("default"))) const cudasim::Kernel cudasim_kernel_{name} = '
        f'{{cudasim::Described<&{name}>::call, cudasim::Described<&{name}>::types, "{parameters}"}};'
    )


def compile_all(sources, workers=None):
    """Compile several sources at once and return their libraries' paths."""
    scheduler()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(Source.build, sources))


def scheduler():
    """The path of the compiled scheduler, which all modules link."""
    target = CACHE / f"scheduler-{digest([compiler_version(), simulator_digest()])}.o"
    if not target.exists():
        with finished_as(target) as unfinished:
            run(["g++", *SCHEDULER, "-I", INCLUDE, "-c", HERE / "scheduler.cpp", "-o", unfinished])
    return target


def run(command, text=None):
    done = subprocess.run(list(map(str, command)), input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


class finished_as:
    """A path to write to which takes its final name when complete: other processes may be at the same file."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.path.parent.mkdir(exist_ok=True)
        handle, self.unfinished = tempfile.mkstemp(dir=self.path.parent, suffix=self.path.suffix)
        os.close(handle)
        return self.unfinished

    def __exit__(self, kind, *_):
        if kind is None:
            os.replace(self.unfinished, self.path)
        else:
            os.unlink(self.unfinished)


def digest(parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def compiler_version():
    return run(["g++", "--version"]) + run(["g++", "-dumpmachine"])


@functools.cache
def simulator_digest():
    files = sorted(p for p in [*HERE.glob("*.h"), *HERE.glob("*.cpp"), *INCLUDE.rglob("*.h"), HERE / "build.py"])
    return digest([(str(p.relative_to(HERE)), p.read_bytes()) for p in files])
