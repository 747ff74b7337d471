"""Time of the step's parts over m and n, the models fitted to it, and what they say of O(m³ + mn)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import fastnewton as fn
from bench import ceilings, compare, exchange, fits, gpu, memory, network, peers, roofline, timing, train
from bench.report import Table, Words, milliseconds
from fastnewton.server import ParameterServer

MS = (2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)
CUBES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # m at which the eigenproblem is timed
SHARDED = (1 << 22, 1 << 24, 1 << 26)  # n of which a rank gets n/m coordinates
WRITES = (2, 8, 32, 128, 512)
FILLING = 1 << 33  # of m²n, and
EIGENPROBLEMS = 1 << 36  # of m⁴: what handing in the first row of every worker may cost
CHECKED = 1 << 22  # up to this m·n a result is checked against the reference before it is timed
BEYOND = 4  # times compare.own_cache, or the L2 cache of a device: from there on a pass counts as one over memory
PARTS = ("gram", "combine", "spectrum")
SCALES = {"a": 1e6, "b·mn": 1e12, "c·m²n": 1e12, "d·m³": 1e12}  # of the factors in the table
RANKS_N = 1 << 22


@dataclass(frozen=True)
class Shape:
    """What is timed; `sharded` is the n of which a rank holds these n/m coordinates of all m workers."""

    m: int
    n: int
    sharded: int | None = None
    write: bool = False


@dataclass(frozen=True)
class Side:
    """Where it is timed: rows to step from, a ceiling that moves `moved` bytes, and the bytes of the cache."""

    kind: str
    name: str
    workers: Callable[[int, int], tuple[Any, Any]]
    ceiling: Callable[[], object]
    moved: int
    cache: int
    settle: Callable[[], None] = lambda: None


def side(kind: str) -> Side:
    """The "cpu", or the "cuda" device."""
    if kind == "cpu":
        read = ceilings.read_ceiling()
        return Side(kind, ceilings.cpu_name(), peers.workers, read, read.bytes, compare.own_cache())
    if not gpu.available():
        raise SystemExit("--device cuda needs CuPy and a CUDA device: pip install 'fastnewton[cuda13]'")
    found = gpu.device()
    rows = (lambda m, n: gpu.workers(gpu.Case(m, n)), gpu.copy(), 2 * gpu.COPIED)
    return Side(kind, found["device"], *rows, found["l2"], gpu.settle)


def shapes(quick: bool, kind: str = "cpu") -> list[Shape]:
    """A grid in one process, what a rank of the sharded exchange holds, and on the CPU asynchronous Writes."""
    largest, ms = (1 << 26, MS[::2]) if quick else (1 << 27, MS)
    grid = {(m, 1 << k) for m in ms for k in range(12, 27, 2) if m << k <= largest}
    grid |= {(m, largest // m) for m in ms if largest % m == 0}
    cost = {m: (FILLING >> 2 * quick) // m**2 for m in WRITES if m**4 <= EIGENPROBLEMS >> 4 * quick}
    whole = [Shape(m, n, write=kind == "cpu" and n <= cost.get(m, 0)) for m, n in sorted(grid)]
    return whole + [Shape(m, n // m, sharded=n) for n in (SHARDED[1:] if quick else SHARDED) for m in ms]


def measure(shape: Shape, on: Side, rounds: int) -> dict:
    """Seconds of the parts, in turn with the ceiling."""
    thetas, grads = on.workers(shape.m, shape.n)
    out = thetas[0] * 0
    c = fn.spectrum(fn.gram(grads)).coefficients
    if on.kind == "cpu" and shape.m * shape.n <= CHECKED:
        peers.check(fn.step(thetas, grads, lr=peers.LR, cutoff=peers.CUTOFF)[0], thetas, grads)
    tasks = {
        "ceiling": on.ceiling,
        "gram": lambda: fn.gram(grads),
        "combine": lambda: fn.combine(thetas, grads, c, lr=peers.LR, out=out),
    }
    if shape.write:
        tasks |= _write(shape.m, thetas, grads)
    samples = timing.interleaved(tasks, rounds=rounds, settle=on.settle)
    bandwidth = on.moved / samples.pop("ceiling").median
    return {"m": shape.m, "n": shape.n, "sharded": shape.sharded, "bandwidth": bandwidth} | {
        "seconds": {name: sample.median for name, sample in samples.items()},
        "spread": {name: sample.spread for name, sample in samples.items()},
    }


def _write(m: int, thetas: np.ndarray, grads: np.ndarray) -> dict[str, Callable[[], object]]:
    """Prepare an asynchronous Write."""
    server = ParameterServer(thetas[0], m, "async", lr=peers.LR, cutoff=peers.CUTOFF)
    for k in range(m):
        server.write(k, thetas[k], grads[k])
    return {"write": lambda: server.write(0, thetas[0], grads[0])}


def eigenproblems(on: Side, rounds: int, quick: bool) -> list[dict]:
    """Seconds of `fn.spectrum`, which knows nothing of n."""
    grams = {m: fn.gram(on.workers(m, 4 * m)[1]) for m in CUBES if not quick or m in MS}
    tasks = {m: partial(fn.spectrum, gram) for m, gram in grams.items()}
    samples = timing.interleaved(tasks, rounds=rounds, settle=on.settle)
    return [{"m": m, "seconds": {"spectrum": sample.median}} for m, sample in samples.items()]


def fitted(rows: list[dict], cubes: list[dict], cache: int) -> dict[str, dict]:
    """Each part's model in cache and beyond, by non-negative least squares; shards of ranks are left out."""
    whole = [row for row in rows if row["sharded"] is None]
    nbytes = {
        "gram": lambda m, n: roofline.gram(m, n, 4).bytes,
        "combine": lambda m, n: roofline.combine(m, n, 4).bytes,
        "write": lambda m, n: roofline.step(m, n, 4).bytes,
    }
    models = {
        "gram": (fits.GRAM, fits.ADDITIVE),
        "combine": (fits.COMBINE, fits.ADDITIVE),
        "write": (fits.WRITE, fits.WRITE_OF_ALL),
    }
    found = {"spectrum": fits.described(fits.SPECTRUM, fits.SPECTRUM, _points(cubes, "spectrum"))}
    for part, chosen in models.items():
        for where, is_there in (("in cache", lambda b: b <= cache), ("beyond", lambda b: b >= BEYOND * cache)):
            near = [row for row in whole if part in row["seconds"] and is_there(nbytes[part](row["m"], row["n"]))]
            if len(near) > len(chosen[1].terms):
                found[f"{part}, {where}"] = fits.described(*chosen, _points(near, part))
    return found


def _points(rows: list[dict], part: str) -> np.ndarray:
    return np.array([(row["m"], row.get("n", 0), row["seconds"][part]) for row in rows], float).T


def predicted(found: dict[str, dict], part: str, m: int, n: int) -> float:
    """Seconds of gram or combine by its model, beyond the cache where there is one."""
    fit, model = fits.farthest(found, part)[0], {"gram": fits.GRAM}.get(part, fits.COMBINE)
    factors = np.array([fit["factors"][term][0] for term in model.terms])
    return float(model.seconds(factors, *np.array([[m], [n]], float))[0])


def memory_held() -> list[dict]:
    """Peak memory beside the caller's arrays: of a step in one process, and of a rank over MPI."""
    rows = []
    for m, n in ((8, 1 << 20), (8, 1 << 23), (64, 1 << 14), (64, 1 << 20), (512, 1 << 12), (512, 1 << 17)):
        rows.append({"what": "fn.step, out=", "m": m, "n": n, "bytes": memory.peak_of_step(m, n)})
    settings = {"lengths": [RANKS_N], "rounds": 1, "most_bytes": exchange.MOST_BYTES}
    for ranks in exchange.RANKS:
        (row,) = train.run_ranks("bench.exchange_rank", ranks, settings, after=lambda: None)
        for kind, held in row["memory"].items():
            rows.append({"what": kind, "m": ranks, "n": RANKS_N, "bytes": held and 4 * held * RANKS_N})
    return rows


# -- what is said of it ---------------------------------------------------------------------------------------


def fits_table(found: dict[str, dict]) -> Table:
    """Factors with their confidence intervals, residuals, and the models compared."""
    lines = []
    for name, fit in found.items():
        other = [error for model, error in fit["left out"].items() if model != fit["model"]]
        errors = [fit["median error"], fit["largest error"], fit["left out"][fit["model"]], *other]
        cells = [f"{100 * error:.0f}" for error in errors] + [""] * (1 - len(other))
        factors = [_interval(fit["factors"].get(term), scale) for term, scale in SCALES.items()]
        lines.append((name, *factors, str(fit["points"]), *cells))
    models = {fit["model"]: name.partition(",")[0] for name, fit in reversed(found.items())}
    note = f"t = {'; '.join(f'{model} ({part})' for model, part in models.items())}. "
    note += (
        "Non-negative least squares on relative errors; in brackets 95 % intervals by bootstrap. In cache: the bytes "
        f"of the pass fit this process's share of the last-level cache; beyond: they are at least {BEYOND} times that. "
        "Errors in %. Left out: root mean square of the relative errors at points left out of the fit, one at a time; "
        "additive: the same where mn and m²n terms are added up."
    )
    columns = ("part", "a, µs", "b, ps", "c, ps", "d, ps", "points", "median", "largest", "left out", "additive")
    return Table("The parts of a step over m and n: models", columns, lines, note)


def _interval(values: list[float | None] | None, scale: float = 1.0) -> str:
    if values is None:
        return ""
    value, low, high = ("∞" if number is None else f"{float(f'{scale * number:.2g}'):g}" for number in values)
    return f"{value} ({low}…{high})"


def sharded_table(rows: list[dict], cubes: list[dict], found: dict[str, dict]) -> Table:
    """Work of one rank at the largest n, beside what the models say, to which these were not fitted."""
    n = max(row["sharded"] or 0 for row in rows)
    cubed, lines = {row["m"]: row["seconds"]["spectrum"] for row in cubes}, []
    for row in (row for row in rows if row["sharded"] == n):
        m, taken = row["m"], row["seconds"]
        own = taken["gram"] + taken["combine"]
        foreseen = sum(predicted(found, part, m, row["n"]) for part in ("gram", "combine"))
        cells = (taken["gram"], taken["combine"], cubed[m], own + cubed[m])
        lines.append((str(m), *map(milliseconds, cells), f"{100 * (foreseen / own - 1):+.0f} %"))
    note = "Times in ms. Model: gram and combine as predicted from one process, to which shards were not fitted."
    title = f"Work of one of m ranks, sharded, n = 2^{n.bit_length() - 1}"
    return Table(title, ("m", *PARTS, "together", "model"), lines, note)


def memory_table(rows: list[dict]) -> Table:
    """Measured peaks beside what is to be expected."""
    lines = []
    for row in rows:
        m, n, held = row["m"], row["n"], row["bytes"]
        if row["what"] in network.KINDS:
            law, wanted = ("O(n): 3n", "O(mn): (2m + 1)n")[row["what"] == "allgather"], network.held(row["what"], m, n)
        else:
            law, wanted = "O(m² log n)", 8 * m * m * np.log2(n)
        size = (8 * m + 4) * n if law == "O(m² log n)" else 8 * n
        lines.append((row["what"], str(m), f"{n:,}", *(_mb(value) for value in (size, held, wanted)), law))
    columns = ("", "m", "n", "caller's arrays", "peak beside them", "expected", "law")
    note = (
        "MB, float32; a rank's arrays are its θ and g. The peak contains what the system and MPI take once, about 1 MB "
        "in one process. Expected of fn.step: m² log₂ n numbers in float64."
    )
    return Table("Peak memory", columns, lines, note)


def _mb(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:,.1f}"


def answer(found: dict[str, dict], rows: list[dict], cubes: list[dict]) -> Words:
    """Where the step is O(m³ + mn), in words."""
    said = [_of_one_process(found, [row for row in rows if row["sharded"] is None]), _of_a_rank(rows)]
    said += [_of_a_write(found[name], name) for name in ("write, beyond", "write, in cache") if name in found]
    cube, m = found["spectrum"]["factors"]["d·m³"][0], cubes[-1]["m"]
    passes = sum(predicted(found, part, m, 1 << 20) for part in ("gram", "combine"))
    share = 100 * cube * m**3 / (passes + cube * m**3)
    said.append(f"m³: {1e9 * cube:.2g} ns · m³, {share:.0f} % of a step in one process at m = {m}, n = 2^20.")
    return Words("Is the step O(m³ + mn)?", said)


def _of_one_process(found: dict[str, dict], rows: list[dict]) -> str:
    gram, where = fits.farthest(found, "gram")
    row = max(rows, key=lambda row: (row["m"], row["n"]))
    ratio = row["seconds"]["gram"] * row["bandwidth"] / roofline.gram(row["m"], row["n"], 4).bytes
    larger, added = (gram["left out"][str(model)] for model in (fits.GRAM, fits.ADDITIVE))
    better = "better" if larger < added else "worse"
    return (
        "In one process as long as memory is the limit: gram's m²n overtakes mn at "
        f"m = {_interval(gram['crossover'])}{where}, and at m = {row['m']}, n = {row['n']:,} gram takes "
        f"{ratio:.1f} times what reading its bytes takes. max(b·mn, c·m²n) predicts points left out {better} than the "
        "sum does."
    )


def _of_a_rank(rows: list[dict]) -> str:
    n = max(row["sharded"] or 0 for row in rows)
    taken = {row["m"]: row["seconds"]["gram"] + row["seconds"]["combine"] for row in rows if row["sharded"] == n}
    slope = np.polyfit(np.log(list(taken)), np.log(list(taken.values())), 1)[0]
    times = " and ".join(f"{milliseconds(taken[m])} ms with m = {m}" for m in (min(taken), max(taken)))
    verdict = "yes" if slope < 1.05 else "not as measured"
    return (
        f"Per worker when sharded, {verdict}: a rank has n/m coordinates of m rows, and m²·(n/m) = mn. At n = "
        f"2^{n.bit_length() - 1} its two passes take {times}: they grow as m^{slope:.2f}, and m^1 is allowed."
    )


def _of_a_write(fit: dict, name: str) -> str:
    without, with_it = (fit["left out"][str(model)] for model in (fits.WRITE, fits.WRITE_OF_ALL))
    verdict = "yes: no m²n term is seen" if with_it > 0.9 * without else "not as measured: an m²n term fits better"
    return (
        f"Per asynchronous Write ({name.partition(', ')[2]}) {verdict}. Points left out of a + b·mn + d·m³ are off by "
        f"{100 * without:.0f} %, with c·m²n added by {100 * with_it:.0f} %."
    )
