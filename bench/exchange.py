"""The exchanges over MPI on this machine, beside the all-reduce of the gradient that plain SGD needs."""

import itertools
import math
from collections.abc import Callable

from bench import train
from bench.report import Table

RANKS = (2, 4, 8)
MOST_BYTES = 6 << 30  # that all ranks together hold in the allgather exchange
TARGET = 1.75  # times the all-reduce, for 4 ranks and n = 2²²: 1.5 by bytes, the rest is work on shared cores


def measure(largest: int, rounds: int, after: Callable[[], None]) -> list[dict]:
    """Rows of figures for n = 2¹⁴, 2¹⁶ … 2^largest and every number of ranks."""
    settings = {"lengths": lengths(largest), "rounds": rounds, "most_bytes": MOST_BYTES}
    return [
        row for ranks in RANKS for row in train.run_ranks("bench.exchange_rank", ranks, settings, after, limit=600.0)
    ]


def lengths(largest: int) -> list[int]:
    """The n that are measured."""
    return [1 << power for power in range(14, largest + 1, 2)]


def table(rows: list[dict]) -> Table:
    """Times, ratios to the all-reduce, traffic and memory."""
    columns = ("ranks", "n", "all-reduce ms", "sharded ms", "ratio", "allgather ms", "ratio", "sent, ring", "sharded")
    return Table(
        "The exchanges",
        (*columns, "memory, sharded", "allgather"),
        [_cells(row) for row in rows],
        " ".join((NOTE, *_findings(rows))),
    )


def crossover(rows: list[dict]) -> float:
    """The n from which sharded is the faster, for rows of one number of ranks: 0 if throughout, infinity if nowhere."""
    both = [row for row in rows if "allgather" in row["seconds"]]
    points = [(math.log(row["n"]), math.log(row["seconds"]["sharded"] / row["seconds"]["allgather"])) for row in both]
    found = 0.0
    for (x, y), (x_after, y_after) in itertools.pairwise(points):
        if y > 0 >= y_after:
            found = math.exp(x + (x_after - x) * y / (y - y_after))
    return found if points and points[-1][1] <= 0 else math.inf


def _findings(rows: list[dict]) -> list[str]:
    """In words: where the exchanges are equally fast, and whether the target is reached."""
    words = []
    for ranks in sorted({row["ranks"] for row in rows}):
        equal = crossover([row for row in rows if row["ranks"] == ranks])
        where = {0.0: "throughout", math.inf: "nowhere"}.get(equal, f"from n = {equal:.2g} on")
        words.append(f"{ranks} ranks: sharded is faster {where}.")
    if row := at_target(rows):
        ratio = row["seconds"]["sharded"] / row["seconds"]["allreduce"]
        reached = "reached" if ratio <= TARGET else "not reached"
        words.append(f"Sharded, 4 ranks, n = 2^22: {ratio:.2f} times the all-reduce; target {TARGET}: {reached}.")
    return words


def at_target(rows: list[dict]) -> dict | None:
    """The figures of 4 ranks and n = 2²², if they were measured."""
    return next((row for row in rows if (row["ranks"], row["n"]) == (4, 1 << 22)), None)


NOTE = (
    "Medians; float32. Sent: bytes per rank, beside those of a ring all-reduce. Memory: the largest growth of a rank "
    "over its arrays, in arrays of n, without out=; for short arrays mostly what MPI itself takes."
)


def _cells(row: dict) -> tuple[str, ...]:
    seconds, ranks, n = row["seconds"], row["ranks"], row["n"]
    ring = 2 * 4 * n * (ranks - 1) / ranks

    def timed(kind: str) -> tuple[str, str]:
        if kind not in seconds:
            return "", ""
        return f"{1e3 * seconds[kind]:.3g}", f"{seconds[kind] / seconds['allreduce']:.2f}"

    memory = [row["memory"].get(kind) for kind in ("sharded", "allgather")]
    return (
        str(ranks),
        f"2^{n.bit_length() - 1}",
        f"{1e3 * seconds['allreduce']:.3g}",
        *timed("sharded"),
        *timed("allgather"),
        f"{ring:.3g}",
        f"{row['sent']['sharded'] / ring:.3f} ×",
        *("" if found is None else f"{found:.1f}" for found in memory),
    )
