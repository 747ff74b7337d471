"""Compute golden values through the public API: the same file runs on both trees.

    python compute.py OUT.npz [--quick] [--ranks]

--ranks computes only what needs MPI; --quick a part of everything, under the same names.  Each number of threads,
vector width and number of ranks is a process of its own.  GOLDEN_TREE, where set, is the folder that fastnewton must
come from.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np
import store

VERSION = 1  # of the cases and their data: run.sh keeps the base's results for each
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
WORKERS = (1, 2, 3, 5, 8, 9, 12, 16, 17, 33, 64, 128, 129)
LENGTHS = (0, 1, 7, 650, 1024, 1025, 4099, 1 << 17)
MIDDLE = ((1, 1025), (2, 7), (3, 650), (8, 4099), (12, 1024), (17, 4099), (33, 1025), (64, 650), (129, 4099))
LONG = ((2, (1 << 22) + 3, "float32"), (2, (1 << 23) + 5, "bfloat16"), (10, (1 << 21) + 5, "float64"))  # streamed
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+64bit,+cx16,+popcnt,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,"
    "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe",
}
SCALES = {  # of gradients whose products underflow or overflow
    "tiny": {"float16": 1e-5, "bfloat16": 1e-25, "float32": 1e-25, "float64": 1e-180},
    "huge": {"float16": 1e2, "bfloat16": 1e22, "float32": 1e22, "float64": 1e160},
}
ON = {"min_cosine": None, "max_coefficient": None, "curvature": "keep", "max_newton_norm": None}

# Data and options of a step; `guards` are arguments of Safeguards.
OPTIONS = [
    ("smooth", {"cutoff": 0.5}),
    ("smooth", {"cutoff": 0.01}),
    ("smooth", {"cutoff": 1e-3}),
    ("steep", {"cutoff": 9e-4}),
    ("steep", {"cutoff": 1e-6}),
    ("steep", {"cutoff": 1e-6, "max_rank": 2}),
    ("smooth", {"max_rank": 0}),
    ("smooth", {"max_rank": 1}),
    ("smooth", {"max_rank": 1 << 70}),
    ("smooth", {"lr": 0.0}),
    ("smooth", {"lr_rest": 0.0}),
    ("smooth", {"lr_rest": 0.05}),
    ("smooth", {"lr_cap": "sigma"}),
    ("smooth", {"lr_cap": "sigma", "lr_rest": 0.05, "cutoff": 0.01}),
    ("smooth", {"lr_cap": "sigma", "max_rank": 0}),
    ("smooth", {"lr_cap": "curvature", "lr": 1e3}),
    ("smooth", {"lr_cap": "curvature", "lr": 1e3, "lr_rest": 0.05, "max_rank": 2}),
    ("smooth", {"lr_cap": "curvature", "max_rank": 0}),
    ("steep", {"lr_cap": "curvature", "lr": 1e3, "cutoff": 1e-6}),
    ("bent", {"lr_cap": "curvature", "lr": 1e3, "nonfinite": "propagate"}),
    ("alike", {"lr_cap": "curvature", "lr": 1e3}),
    ("wide", {"lr_cap": "curvature"}),
    ("nan", {"lr_cap": "curvature", "nonfinite": "drop"}),
    ("smooth", {"nonfinite": "propagate"}),
    ("smooth", {"nonfinite": "drop"}),
    *(
        (kind, {"nonfinite": mode})
        for kind in ("nan", "nan thetas", "nan rows")
        for mode in ("raise", "drop", "propagate")
    ),
    ("alike", {}),
    ("zero", {}),
    ("tiny", {}),
    ("tiny", {"nonfinite": "propagate"}),
    ("huge", {}),
    ("huge", {"lr_cap": "sigma", "nonfinite": "propagate"}),
    ("wide", {}),
    ("wide", {"nonfinite": "propagate"}),
    *((kind, {"guards": {}}) for kind in ("smooth", "bent", "alike", "zero", "tiny", "huge", "wide", "nan rows")),
    ("steep", {"guards": {}, "cutoff": 1e-6}),
    ("nan", {"guards": {}, "nonfinite": "drop"}),
    ("nan", {"guards": {}, "nonfinite": "propagate"}),
    ("wide", {"guards": {}, "nonfinite": "propagate"}),
    ("bent", {"guards": {"curvature": "abs"}, "cutoff": 0.01}),
    ("bent", {"guards": {"curvature": "keep"}, "cutoff": 0.01, "lr_rest": 0.05}),
    ("bent", {"guards": {"min_cosine": 0.0, "max_newton_norm": None}, "lr": 1.0}),
    ("smooth", {"guards": ON}),
    ("smooth", {"guards": {**ON, "min_cosine": 0.99}}),
    ("smooth", {"guards": {**ON, "max_coefficient": 1e-9}}),
    ("smooth", {"guards": {**ON, "max_coefficient": 1e-9, "fallback_lr": 0.01}}),
    ("smooth", {"guards": {**ON, "max_newton_norm": 1e-3}, "lr_rest": 0.05}),
    ("smooth", {"guards": {}, "lr_cap": "curvature", "lr": 1e3}),
    ("smooth", {"guards": {}, "lr_cap": "sigma", "max_rank": 1}),
]
OF_RANKS = [  # over MPI, indices of OPTIONS would shift
    ("smooth", {}),
    ("smooth", {"lr_rest": 0.05, "cutoff": 0.01}),
    ("steep", {"cutoff": 1e-6}),
    ("smooth", {"max_rank": 1}),
    ("smooth", {"lr_cap": "sigma"}),
    ("smooth", {"lr_cap": "curvature", "lr": 1e3}),
    ("smooth", {"nonfinite": "propagate"}),
    *(("nan", {"nonfinite": mode}) for mode in ("raise", "drop", "propagate")),
    ("nan thetas", {"nonfinite": "drop"}),
    ("tiny", {}),
    ("huge", {}),
    ("wide", {}),
    ("smooth", {"guards": {}}),
    ("bent", {"guards": {}}),
    ("bent", {"guards": {"curvature": "abs"}}),
    ("smooth", {"guards": {**ON, "min_cosine": 0.99}}),
    ("nan", {"guards": {}, "nonfinite": "drop"}),
]

entries = {}


def put(name, value):
    """Keep a value."""
    assert name not in entries, name
    entries[name] = store.encode(value)


@lru_cache(maxsize=4)
def _values(m, n, kind):
    rng = np.random.default_rng([m, n, zlib.crc32(kind.encode())])
    decades = 7 if kind == "steep" else 2
    spread = rng.permutation(10.0 ** (-decades * np.arange(m) / max(1, m - 1)))[:, None]
    origin, slope = rng.standard_normal(n), 2.0 ** rng.uniform(-3, 3, n)
    moved = rng.standard_normal((m, n), np.float32) * (0.0 if kind == "alike" else spread)
    sign = np.where(np.arange(m) % 2, -1.0, 1.0)[:, None] if kind == "bent" else 1.0
    grads = slope * (origin / 4 + sign * moved)
    if kind != "alike":
        grads += rng.standard_normal((m, n), np.float32) * spread / 8
    return origin + moved, grads * (kind != "zero")


def data(m, n, dtype, kind="smooth"):
    """(thetas, grads), each (m, n): gradients of a quadratic at points whose spread differs, with noise.

    Only exactly rounded operations on the numbers of a generator, so that both trees see the same bits.
    """
    base = kind if kind in ("steep", "bent", "alike", "zero") else "smooth"
    thetas, grads = _values(m, n, base)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in SCALES:
            grads = grads * SCALES[kind][dtype]
        if kind == "wide":  # differences of finite numbers overflow
            largest = {"float16": 6e4, "float64": 1.7e308}.get(dtype, 3.2e38)
            thetas = np.where(np.arange(m) % 2, -1.0, 1.0)[:, None] * largest * np.minimum(np.abs(thetas), 1.0)
        thetas, grads = thetas.astype(DTYPES[dtype]), grads.astype(DTYPES[dtype])
    if n and kind.startswith("nan"):
        if kind == "nan rows":
            grads[:, n // 2] = np.nan
        else:
            thetas[1 % m, n - 1] = np.nan
            if kind == "nan":
                grads[m // 2, 0] = np.inf
    return thetas, grads


def told(name, info):
    """Keep the numbers of a StepInfo."""
    for field in (
        "rank",
        "singular_values",
        "coefficients",
        "lr",
        "lr_rest",
        "captured",
        "accepted",
        "reason",
        "dropped",
    ):
        value = getattr(info, field)
        if field in ("rank", "accepted", "dropped"):
            value = str(tuple(map(int, value)) if field == "dropped" else int(value))
        put(f"{name}/info.{field}", value)
    if info.diagnostics is not None:
        diagnosed(f"{name}/info.diagnostics", info.diagnostics)


def diagnosed(name, found):
    """Keep the numbers of Diagnostics."""
    for field in ("captured", "asymmetry", "noise_to_secant", "curvatures"):
        put(f"{name}.{field}", getattr(found, field))


def fields(name, found, names):
    """Keep those attributes that are not None."""
    for field in names:
        if getattr(found, field) is not None:
            put(f"{name}/{field}", getattr(found, field))


GRAM = ("matrix", "projection", "norm2", "floor", "theta_matrix", "cross_matrix", "theta_floor", "cross_projection")
SPECTRUM = ("singular_values", "vectors", "rank", "coefficients", "captured")


def stepped(name, call):
    """Keep what a step returns, or the error that it raises."""
    try:
        theta, info = call()
    except ArithmeticError as error:
        put(f"{name}/error", f"{type(error).__name__} {tuple(map(int, error.workers))}")
        return
    put(f"{name}/theta", theta)
    told(name, info)


def arguments(options):
    """Options as keyword arguments, and as they stand in a name."""
    given = {"lr": 0.1, **options}
    label = " ".join(f"{name}={value}" for name, value in options.items() if name != "guards") or "defaults"
    if "guards" in given:
        guards = given.pop("guards")
        given["safeguards"] = fn.Safeguards(**guards)
        label += " safeguards(" + ", ".join(f"{name}={value}" for name, value in guards.items()) + ")"
    return given, label


# -- one process --------------------------------------------------------------------------------------------


def plain(name, m, n, dtype):
    """Every function with its defaults."""
    thetas, grads = data(m, n, dtype)
    stepped(f"step/{name}", lambda: fn.step(thetas, grads, lr=0.1))
    gram = fn.gram(grads)
    fields(f"gram/{name}", gram, GRAM[:4])
    fields(f"gram precision=float64/{name}", fn.gram(grads, precision="float64"), GRAM[:4])
    found = fn.spectrum(gram)
    fields(f"spectrum/{name}", found, SPECTRUM)
    c = np.random.default_rng([m, n]).standard_normal(m)
    put(f"combine/{name}/theta", fn.combine(thetas, grads, c, lr=0.1))
    put(
        f"combine precision=float64/{name}/theta",
        fn.combine(thetas, grads, c, lr=0.1, lr_rest=0.05, precision="float64"),
    )
    if (m + 1) * n < 1 << 22:
        joint = fn.gram(grads, thetas=thetas)
        fields(f"gram thetas/{name}", joint, GRAM)
        diagnosed(f"diagnostics/{name}/of", fn.diagnostics(joint, fn.spectrum(joint)))


def with_z(name, m, n, dtype):
    """apply_inverse, and gram with all arguments."""
    thetas, grads = data(m, n, dtype)
    z = np.random.default_rng([n]).standard_normal(n).astype(DTYPES[dtype])
    fields(f"gram z/{name}", fn.gram(grads, z), GRAM[:4])
    fields(f"gram z thetas/{name}", fn.gram(grads, z, thetas=thetas, precision="float64"), GRAM)
    for kind, given in (("smooth", {}), ("smooth", {"max_rank": 1}), ("steep", {"cutoff": 1e-6})):
        first, second = data(m, n, dtype, kind)
        label = arguments(given)[1]
        out = np.zeros_like(z)
        assert fn.apply_inverse(first, second, z, out=out, **given) is out
        put(f"apply_inverse/{name} {kind}/{label}/theta", out)
    for given in ({"cutoff": 0.5}, {"cutoff": 1e-9}, {"max_rank": 0}, {"max_rank": 1}):
        fields(f"spectrum/{name}/{arguments(given)[1]}", fn.spectrum(fn.gram(grads), **given), SPECTRUM)


def laid_out(name, m, n, dtype):
    """Strides, alignments, sequences and out=."""
    thetas, grads = data(m, n, dtype)
    table = np.zeros((2 * m, n + 5), DTYPES[dtype])
    table[::2, 3 : n + 3], table[1::2, 1 : n + 1] = thetas, grads
    rows = table[::2, 3 : n + 3], table[1::2, 1 : n + 1]
    apart = [row.copy() for row in grads]
    for row in apart:
        row.flags.writeable = False
    space = np.zeros(n + 1, DTYPES[dtype])
    layouts = {
        "strided": (*rows, None),
        "strided, out": (*rows, np.zeros(n, DTYPES[dtype])),
        "out between items": (thetas, grads, space[1:]),
        "sequence": (list(thetas), tuple(apart), None),
        "mixed": (rows[0], apart, np.zeros(n, DTYPES[dtype])),
    }
    for layout, (first, second, out) in layouts.items():
        stepped(f"layout/{name}/{layout}", lambda f=first, s=second, o=out: fn.step(f, s, lr=0.1, out=o))
        fields(f"layout/{name}/{layout}/gram", fn.gram(second, thetas=first), GRAM)
        stepped(
            f"layout/{name}/{layout} safeguards()",
            lambda f=first, s=second, o=out: fn.step(f, s, lr=0.1, out=o, safeguards=fn.Safeguards()),
        )


def streamed(name, m, n, dtype):
    """Results that bypass the cache, aligned and not."""
    thetas, grads = data(m, n, dtype)
    c = np.random.default_rng([m, n]).standard_normal(m)
    space = np.zeros(n + 1, DTYPES[dtype])
    for label, out in (("new", None), ("out", space[:-1]), ("out between items", space[1:])):
        put(f"streamed/{name}/{label}/theta", fn.combine(thetas, grads, c, lr=0.1, out=out))
    stepped(f"streamed/{name}", lambda: fn.step(thetas, grads, lr=0.1))


def served(name, m, n, dtype, mode, options):
    """A parameter server through rounds of Writes, and its state in another one."""
    given, label = arguments(options)
    name = f"server/{name}/mode={mode} {label}"
    servers = [ParameterServer(np.zeros(n, DTYPES[dtype]), m, mode, **given)]
    for turn in range(4):
        thetas, grads = data(m, n, dtype)
        rng = np.random.default_rng([m, n, turn])
        factors, shift = rng.integers(1, 9, m) / 8, turn % 3 * 50  # far from r, which then moves
        for k in rng.permutation(m):
            theta, grad = (thetas[k] * DTYPES[dtype](factors[k]), grads[k] + DTYPES[dtype](shift))
            for number, server in enumerate(servers):
                try:
                    server.write(int(k), theta, grad)
                except ArithmeticError as error:
                    put(f"{name}/turn {turn} server {number} worker {k}/error", type(error).__name__)
        for number, server in enumerate(servers):
            theta, version = server.read()
            put(f"{name}/turn {turn} server {number}/theta", theta)
            put(f"{name}/turn {turn} server {number}/version", version)
            if server.info is not None:
                told(f"{name}/turn {turn} server {number}", server.info)
        if turn == 1:
            state = servers[0].state_dict()
            for field, value in sorted(state.items()):
                put(f"{name}/state/{field}", value)
            servers.append(ParameterServer(np.ones(n, DTYPES[dtype]), m, mode, **given))
            servers[1].load_state_dict(state)


def local(quick, suffix):
    """Everything that needs no MPI."""

    def sizes(every, few):
        for m, n in every:
            for dtype in DTYPES:
                if not quick or (m, n) in few or (m, n, dtype) in few:
                    yield f"m={m} n={n} {dtype} {suffix}", m, n, dtype

    product = [(m, n) for m in WORKERS for n in LENGTHS]
    few = {(3, 0), (3, 650), (17, 1025), (33, 650), (64, 1025), (128, 650), (129, 650), (17, 1 << 17, "bfloat16")}
    few |= {(m, n, "float32") for m, n in ((1, 7), (2, 1 << 17), (9, 4099), (16, 1025))} | {(8, 1 << 17, "float64")}
    for one in sizes(product, few):
        plain(*one)
    for name, m, n, dtype in sizes(MIDDLE, {(3, 650, "float32"), (3, 650, "bfloat16"), (17, 4099, "float32")}):
        with_z(name, m, n, dtype)
        laid_out(name, m, n, dtype)
    for index, (kind, options) in enumerate(OPTIONS):
        turn = [(3, 650, list(DTYPES)[index % 4]), (33, 1025, list(DTYPES)[(index + 1) % 4])]
        for name, m, n, dtype in sizes(MIDDLE, {(3, 650, "float32"), (17, 4099, "float32"), *turn}):
            given, label = arguments(options)
            thetas, grads = data(m, n, dtype, kind)
            name = f"step/{name} {kind}/{label}"
            stepped(name, lambda t=thetas, g=grads, o=given: fn.step(t, g, **o))
    for m, n, dtype in LONG[:1] if quick else LONG:
        streamed(f"m={m} n={n} {dtype} {suffix}", m, n, dtype)
    of_server = [(m, n) for m in (1, 3, 8, 17) for n in (7, 1025, 4099)]
    for one in sizes(of_server, {(3, 1025, "bfloat16"), (17, 4099, "float32")}):
        for mode in ("sync", "async"):
            served(*one, mode, {})
            served(*one, mode, {"cutoff": 1e-6, "lr_cap": "sigma", "max_rank": 3, "lr_rest": 0.05})
        served(*one, "sync", {"lr_cap": "curvature", "lr": 1e3})
        served(*one, "async", {"max_staleness": 2})


# -- over MPI -----------------------------------------------------------------------------------------------


def over_ranks(quick, suffix):
    """DistNewton with both exchanges, and a server of Clients; what all ranks find, kept by rank 0."""
    from mpi4py import MPI

    from fastnewton.mpi import Client, DistNewton, Segment, serve

    comm = MPI.COMM_WORLD
    m, rank = comm.size, comm.rank

    def step(name, theta, grad, given, **of_step):
        def call():
            with DistNewton(comm, **given) as newton:
                found = newton.step(theta, grad, **of_step)
                traffic.append(newton.traffic)
                return found

        traffic = []
        stepped(name, call)
        if traffic:
            put(f"{name}/traffic", sorted(traffic[0].items()))

    lengths = (7, 1025, 70_001) if quick else (0, 7, 650, 1024, 1025, 4099, 70_001)
    for n in lengths:
        for dtype in DTYPES:
            if quick and dtype not in (("float32",) if n == 7 else ("float32", "bfloat16")):
                continue
            for exchange in ("allgather", "sharded"):
                for kind, options in OF_RANKS:
                    if quick and n != 1025 and "guards" not in options and options:
                        continue
                    given, label = arguments(options)
                    thetas, grads = data(m, n, dtype, kind)
                    name = f"ranks/m={m} n={n} {dtype} {kind} {suffix}/exchange={exchange} {label}"
                    out = {} if options else {"out": (theta := thetas[rank].copy())}
                    theta = thetas[rank] if options else theta
                    step(name, theta, grads[rank], given | {"exchange": exchange}, **out)
                first, second = n // 3, n // 2
                parts = [Segment(first, 0.1), Segment(second, 0.3, 0.02), Segment(n - first - second, 0.2)]
                for options in ({}, {"guards": {}}, {"guards": {**ON, "max_coefficient": 1e-9}}, {"lr_cap": "sigma"}):
                    given, label = arguments(options)
                    thetas, grads = data(m, n, dtype)
                    name = f"ranks/m={m} n={n} {dtype} smooth {suffix}/exchange={exchange} segments {label}"
                    step(name, thetas[rank], grads[rank], given | {"exchange": exchange}, segments=parts)
            thetas, grads = data(m, n, dtype)
            name = f"ranks/m={m} n={n} {dtype} smooth {suffix}/exchange=auto lr of a step"
            step(name, thetas[rank], grads[rank], {"lr": 0.1}, lr=0.2)

    for mode in ("sync", "async") if m > 1 else ():
        n, given, workers = 1025, {"lr": 0.1, "cutoff": 0.01}, comm.Split(int(rank > 0), rank)
        if rank == 0:
            serve(ParameterServer(np.ones(n, np.float32), m - 1, mode, **given), comm)
            continue
        thetas, grads = data(m, n, "float32")
        with Client(comm) as client:
            for turn in range(3):
                for writer in range(1, m):  # one after the other: the order decides
                    if writer == rank:
                        client.write(thetas[rank] * np.float32(turn + 1), grads[rank])
                    workers.Barrier()
                theta, version = client.read()
                put(f"ranks/server m={m - 1} {suffix}/mode={mode}/turn {turn}/theta", theta)
                put(f"ranks/server m={m - 1} {suffix}/mode={mode}/turn {turn}/version", version)
                workers.Barrier()

    every = comm.gather(entries)
    if rank == 0:
        for number, others in enumerate(every[1:], 1):
            for name, value in others.items():
                if name.endswith("/traffic"):
                    entries[f"{name} of rank {number}"] = value
                elif entries.setdefault(name, value) != value:
                    entries[f"{name} of rank {number}"] = value  # ranks disagree


# -- processes ----------------------------------------------------------------------------------------------


def host():
    """Whatever but the tree decides the bits."""
    import llvmlite
    import llvmlite.binding
    import numba

    versions = {"numpy": np, "numba": numba, "llvmlite": llvmlite, "ml_dtypes": ml_dtypes}
    put("host/cpu", f"{llvmlite.binding.get_host_cpu_name()} {platform.machine()} Python {platform.python_version()}")
    for name, module in versions.items():
        put(f"host/{name}", module.__version__)


def run(part, quick, threads=1, ranks=0, environment=None):
    """Another process, or several under mpiexec; what they kept."""
    drop = ("NUMBA_NUM_THREADS", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "SLURM_NTASKS")
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    one |= {"FASTNEWTON_NUM_THREADS": str(threads), **(environment or {})}
    given = {name: value for name, value in os.environ.items() if name not in drop} | one
    launcher = []
    if ranks:
        beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
        launcher = [beside, "-n", str(ranks), sys.executable, "-m", "mpi4py"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.npz"
        suffix = f"threads={threads}" + " avx2" * bool(environment)
        command = [*(launcher or [sys.executable]), __file__, str(out), "--part", part, "--suffix", suffix]
        subprocess.run(command + ["--quick"] * quick, env=given, check=True, stdin=subprocess.DEVNULL)
        return store.load(out)


def main():
    """Parse the command line, and be one part or all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--part", choices=("local", "ranks"))
    parser.add_argument("--suffix", default="")
    chosen = parser.parse_args()
    if chosen.part:
        global fn, ParameterServer
        import fastnewton as fn
        import fastnewton.kernels as kernels
        from fastnewton.server import ParameterServer

        for module in (fn, kernels):
            tree = os.environ.get("GOLDEN_TREE")
            assert tree is None or Path(tree).resolve() in Path(module.__file__).resolve().parents, module.__file__
        (local if chosen.part == "local" else over_ranks)(chosen.quick, chosen.suffix)
        if os.environ.get("PMI_RANK", "0") == "0":
            store.save(chosen.out, entries)
        return
    host()
    if not chosen.ranks:
        for threads in (1, 2):
            entries.update(run("local", chosen.quick, threads))
        if not chosen.quick and platform.machine() == "x86_64":
            entries.update(run("local", True, 1, environment=AVX2))
    for ranks, threads in ((2, 1),) if chosen.quick else ((1, 1), (2, 1), (4, 1), (2, 2)):
        entries.update(run("ranks", chosen.quick, threads, ranks))
    store.save(chosen.out, entries)
    print(f"{len(entries)} values in {chosen.out}")


if __name__ == "__main__":
    main()
