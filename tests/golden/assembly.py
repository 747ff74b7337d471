"""The machine code of every CPU specialisation and the PTX of every CUDA one, normalised.

    python assembly.py OUT.json [--quick] [--cpu | --cuda]

Of each: a digest of its text, without symbols, labels and debug lines; its loops of vector arithmetic, with registers
in order of appearance, those with fused multiply-adds, which are a kernel's own, and others; of the former their vector
operations alone too, sorted; and its vector operations, counted.  Texts are kept beside OUT.json, in a folder `texts`.
`cpu_kernels` and `cuda_kernels` alone know where the trees keep their kernels.
"""

import argparse
import ctypes
import gzip
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

VERSION = 2  # of what is kept, not of `cpu_kernels` and `cuda_kernels`: run.sh keeps the base's results for each
TREE = Path(os.environ.get("GOLDEN_TREE") or Path(__file__).parents[2]).resolve()
ARCHITECTURE = "compute_90"
COMPUTE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+64bit,+cx16,+popcnt,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,"
    "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe",
}


# -- where the trees keep their kernels ---------------------------------------------------------------------


def jobs(quick):
    """The kinds of CPU kernels: gram with its kind, exactly so many rows, types and whether there is z; combine with
    its types, base and rows beside the first, −1 for any number."""
    for storage, compute in [*COMPUTE.items(), *((each, "float64") for each in ("float16", "bfloat16", "float32"))]:
        for m in (3, 9, 16) if quick else range(1, 17):
            if not quick or m == 9 or (storage, compute) == ("float32", "float32"):
                yield "gram", ("straight", m, storage, compute, 0)
            if m in (1, 4, 8, 12, 16) or (m == 3 and storage == compute):
                yield "gram", ("straight", m, storage, compute, 1)
        for with_z in (0,) if quick else (0, 1):
            yield "gram", ("tiled", 0, storage, compute, with_z)
        for others in (1, 8, -1) if quick else range(-1, 9):
            if not quick or storage in ("float32", "bfloat16"):
                yield "combine", (storage, compute, "mean", others)
            if not quick or (others == 8 and storage == "float32"):
                yield "combine", (storage, compute, "z", others)
    for storage in ("float32",) if quick else COMPUTE:
        for kind in ("joint", "row"):
            yield "gram", (kind, 0, storage, "float64", 0)


def cpu_kernels(quick):
    """(key, libraries) of each specialisation, compiled here and now."""
    in_base = (TREE / "kernels" / "cpu.py").exists()
    gram, combine, jit, simd = map(
        importlib.import_module,
        [f"fastnewton.kernels.{name}" for name in ("cpu", "cpu", "compile", "simd")]
        if in_base
        else [f"fastnewton.kernels.cpu.{name}" for name in ("gram", "combine", "jit", "simd")],
    )
    for kind, given in jobs(quick):
        if hasattr(simd, "Kernel"):  # compiled for one block
            dispatcher = simd._kernel
            if kind == "combine":
                storage, compute, base, others = given
                rows = others if others >= 0 else combine.UNROLLED + 1
                calls = [(combine._block.address, (storage, compute, rows, base, streamed)) for streamed in (0, 1)]
            else:
                name, m, storage, compute, with_z = given
                block = {"straight": "_unrolled_block", "row": "_row_block"}.get(name, "_tiled_block")
                constants = {"straight": (m, with_z), "row": ()}.get(name, (int(name == "joint"), with_z))
                if not hasattr(gram, block) or (name == "straight" and m > gram.UNROLLED):
                    continue  # deleted
                calls = [(getattr(gram, block).address, (storage, compute, *constants))]
        else:  # compiled with the loop over all blocks
            dispatcher = gram._gram_run if kind == "gram" else combine._combine_run
            calls = [(jit.kernel, (dispatcher, *given))]
        libraries = []
        for function, arguments in calls:
            before = set(dispatcher.overloads)
            function(*arguments)
            libraries += [dispatcher.overloads[each].library for each in set(dispatcher.overloads) - before]
        yield f"{kind} {' '.join(map(str, given))}", libraries


def former_key(name, macros):
    """What the base calls a CUDA kernel: `project` was `finish`, UNROLLED STRAIGHT, and spectrum.cu had one kind."""
    if name == "spectrum":
        macros["KIND"] = "SPECTRUM"
    if macros.pop("PROJECT", None):
        name = "finish"
    if macros.get("KIND") == "UNROLLED":
        macros["KIND"] = "STRAIGHT"
    return " ".join([name, *(f"{macro}={value}" for macro, value in sorted(macros.items()))])


def cuda_kernels(quick):
    """{key: (source, options)} of each kernel that the budget of GPUs covers."""
    sys.path[:0] = [str(path) for path in (TREE / "tests", TREE / "tests" / "kernels") if path.is_dir()]
    budget = importlib.import_module("cuda_budget")
    cuda = next(each for each in vars(budget).values() if hasattr(each, "FOLDER"))  # the module that launches kernels
    kernels = budget.launched("float32", 8) + budget.launched("float64", 17) if quick else budget.every_kernel()
    for kernel in kernels:
        macros = dict(kernel.macros)
        source = (cuda.FOLDER / kernel.file).read_text()
        yield former_key(kernel.name, dict(macros)), (source, kernel.name, cuda.options(**macros))


# -- machine code -------------------------------------------------------------------------------------------

FUNCTION = re.compile(r"^\s+\.type\s+(\S+),@function\n\1:.*?\n(.*?)^\.Lfunc_end\d+:", re.M | re.S)
SYMBOL = re.compile(r"(?:_ZN|\.const|\.bytes|\.str|numba_|__numba)[\w.$]*")
CONSTANTS = re.compile(r"^(\.LCPI\d+_\d+):\n((?:\s+\.(?:long|quad|zero|short|byte)\b.*\n)+)", re.M)
ARITHMETIC = re.compile(
    r"^v?(?:fn?m(?:add|sub)\w*|add|sub|mul|div|sqrt|max|min|cvt\w*)[ps][sd]\b|^vcvt|^vpmovzx|^vpslld"
)
FAMILY = re.compile(r"%(?:[re]?([abcd])[xhl]|[re]?([sd]i|[sb]p)l?|(r\d+)[dwb]?)\b")
VECTOR = re.compile(r"%([xyz])mm(\d+)")
JUMP = re.compile(r"^j\w+ (L\d+)")


def without_directives(text, constants):
    """The instructions and labels of a function."""
    lines = []
    for line in text.split("\n"):
        line = " ".join(line.split("#")[0].split())
        if line and (not line.startswith(".") or line.startswith(".LBB")):
            line = re.sub(r"\.LCPI\d+_\d+", lambda found: constants.get(found[0], "constant"), line)
            lines.append(SYMBOL.sub("SYMBOL", line))
    return lines


def in_order(found, names, prefix):
    """A name for what was found, by its first appearance."""
    return prefix + str(names.setdefault(found, len(names)))


def renamed(block):
    """A block whose registers are named by their first appearance, with places on the stack left out."""
    general, vectors, lines = {}, {}, []
    for line in block:
        line = re.sub(r"-?\d*\(%r[sb]p\)", "(stack)", line)
        line = FAMILY.sub(lambda found: in_order(found[1] or found[2] or found[3], general, "%g"), line)
        line = VECTOR.sub(lambda found: f"%{found[1]}{in_order(found[2], vectors, '')}", line)
        lines.append(re.sub(r"\bL\d+$", "label", line))
    return "\n".join(lines)


def loops(lines):
    """The innermost loops, of one block each, that do vector arithmetic."""
    found, block, start = [], [], None
    for line in lines:
        if line.endswith(":"):
            block, start = [], line[:-1]
            continue
        block.append(line)
        if jump := JUMP.match(line):
            wide = any(ARITHMETIC.match(each) and VECTOR.search(each) for each in block)
            if jump[1] == start and wide:
                found.append(renamed(block))
            block, start = [], None if jump[1] != start else start
    return found


def instructions(assembly):
    """The functions of a library, in order of their names."""
    assert "cached code" not in assembly, "inspection needs code that was compiled in this process"
    constants = {name: "[" + " ".join(data.split()) + "]" for name, data in CONSTANTS.findall(assembly)}
    for name, body in sorted(FUNCTION.findall(assembly)):
        if not re.match(r"_ZN7cpython|_ZN13_3cdynamic|NRT_|cfunc\.", name):
            labels, text = {}, "\n".join(without_directives(body, constants))
            yield re.sub(r"\.LBB\w+", lambda label, labels=labels: in_order(label[0], labels, "L"), text)


def machine_code(text):
    """What is kept of functions."""
    counts = {name: Counter() for name in ("loops", "mixes", "others", "operations")}
    lines = text.split("\n")
    for loop in loops(lines):
        counts["loops" if "fmadd" in loop else "others"][digest(loop)] += 1
        if "fmadd" in loop:
            wide = sorted(line.split()[0] for line in loop.split("\n") if VECTOR.search(line) or "prefetch" in line)
            counts["mixes"][digest(" ".join(wide))] += 1
    counts["operations"].update(line.split()[0] for line in lines if VECTOR.search(line))
    return kept(text, counts)


# -- PTX ----------------------------------------------------------------------------------------------------


def compiled(source, options, nvrtc):
    """PTX of a source, by NVRTC."""
    library, program = nvrtc._library(), ctypes.c_void_p()
    given = [f"-arch={ARCHITECTURE}", f"-I{nvrtc._folder() / 'include'}", "-ftz=true", *options]
    words = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    size = ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    try:
        assert library.nvrtcCompileProgram(program, len(given), words) == 0, given
        assert library.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert library.nvrtcGetPTX(program, text) == 0
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return text.value.decode()


def ptx(text, name):
    """What is kept of the PTX of one kernel; others in its source are left out."""
    text = re.sub(r"//.*", "", text)
    entries = re.findall(r"^\.visible \.entry (\w+)\(.*?^\}", text, re.M | re.S)
    assert entries == [name], entries
    text = re.sub(rf"\b{name}\b|\b{name}(?=_param)", "KERNEL", text)
    text = re.sub(r"\b_ZZ?N?\w+", "SYMBOL", text)
    for array in re.findall(r"^\.extern \.shared .*?(\w+)\[\]", text, re.M):
        text = re.sub(rf"\b{array}\b", "SHARED", text)
    text = re.sub(r"^\.global .*? = -?\d+;$", "", text, flags=re.M)  # constants that nothing refers to
    labels, registers = {}, {}
    text = re.sub(r"\$L__\w+", lambda found: in_order(found[0], labels, "L"), text)
    text = re.sub(r"%(\w+?)(\d+)\b", lambda found: f"%{found[1]}{in_order(found[0], registers, '')}", text)
    lines = [" ".join(line.split()) for line in text.split("\n")]
    lines = [line for line in lines if line and not re.match(r"\.(?:version|target|address_size|file|loc|reg)\b", line)]
    operations = Counter(
        re.sub(r"^@\S+ ", "", line).split()[0].rstrip(";") for line in lines if re.match(r"[@a-z]", line)
    )
    return kept("\n".join(lines), {"loops": operations, "operations": operations})


# -- all of it ----------------------------------------------------------------------------------------------


def digest(text):
    """A name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(text, counts):
    """The entry of one specialisation; its text goes to the folder of texts."""
    path = texts / f"{digest(text)}.txt.gz"
    if not path.exists():
        path.write_bytes(gzip.compress(text.encode(), 6, mtime=0))
    return {"text": digest(text)} | {name: dict(sorted(each.items())) for name, each in counts.items()}


def main():
    """Parse the command line, and write what was found."""
    global texts
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--part")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    texts = out.parent / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    code = {}
    if chosen.part:
        for key, libraries in cpu_kernels(chosen.quick):
            functions = [text for library in libraries for text in instructions(library.get_asm_str())]
            assert functions, key
            code[f"{chosen.part}/{key}"] = machine_code("\n\n".join(functions))
        out.write_text(json.dumps(code))
        return
    if not chosen.cuda:
        widths = {"cpu": {}, "cpu avx2": AVX2} if platform.machine() == "x86_64" and not chosen.quick else {"cpu": {}}
        for part, environment in widths.items():
            with tempfile.TemporaryDirectory() as folder:  # nothing from a cache: its code cannot be looked at
                places = ("NUMBA_CACHE_DIR", "FASTNEWTON_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
                given = {**os.environ, **environment, **dict.fromkeys(places, folder)}
                command = [sys.executable, __file__, str(out.with_suffix(".part")), "--part", part]
                quick = chosen.quick or part != "cpu"
                subprocess.run(command + ["--quick"] * quick, env=given, check=True)
                code |= json.loads(out.with_suffix(".part").read_text())
                out.with_suffix(".part").unlink()
    if not chosen.cpu:
        kernels = list(cuda_kernels(chosen.quick))
        nvrtc = importlib.import_module("nvrtc")
        for key, (source, name, options) in kernels:
            code[f"cuda/{key}"] = ptx(compiled(source, options, nvrtc), name)
    import llvmlite
    import llvmlite.binding
    import numba

    host = {"cpu": llvmlite.binding.get_host_cpu_name(), "numba": numba.__version__, "llvmlite": llvmlite.__version__}
    out.write_text(json.dumps({"host": host, "code": code}, indent=1))
    print(f"{len(code)} specialisations in {out}")


if __name__ == "__main__":
    main()
