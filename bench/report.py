"""Results as tables on the terminal, as Markdown, and as one JSON file."""

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from bench.quadratic import TARGET_ORDER

FEW = 3  # samples whose number is told
ABOVE = (
    "A share of the roofline may exceed 100 %: its ceilings are medians of the same run, the speed of a host varies, "
    "and short arrays stay in the cache."
)
LONG = 60  # characters of a first column that may be broken into lines
ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out"


@dataclass(frozen=True)
class Table:
    """A table that can be printed and written; the first column is left-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    @property
    def is_short(self) -> bool:
        """Whether the first column need not be broken into lines."""
        return max(len(row[0]) for row in self.rows) < LONG

    def print(self, console: Console) -> None:
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(self.columns):
            whole = self.is_short and not number
            table.add_column(column, justify="right" if number else "left", no_wrap=whole, overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(f"\n[bold]{self.title}[/bold]", table, self.note, sep="\n", highlight=False)

    def markdown(self) -> str:
        rule = [":--", *["--:"] * (len(self.columns) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class Picture:
    """A plot that was written beside the report."""

    title: str
    file: str

    def print(self, console: Console) -> None:
        """Pictures are for the Markdown only."""

    def markdown(self) -> str:
        return f"![{self.title}]({self.file})"


@dataclass(frozen=True)
class Words:
    """What the figures say."""

    title: str
    paragraphs: list[str]

    def print(self, console: Console) -> None:
        console.print(f"\n[bold]{self.title}[/bold]", *self.paragraphs, sep="\n", highlight=False)

    def markdown(self) -> str:
        return "\n\n".join([f"### {self.title}", *self.paragraphs])


def machine(found: dict, rows: list[dict]) -> Table:
    """The ceilings, over all rows of a run."""

    def over(key: str, chosen: list[dict], unit: str) -> tuple[str, ...]:
        values = sorted(row[key] / 1e9 for row in chosen)
        return (f"{values[len(values) // 2]:.1f} {unit}", f"{values[0]:.1f} to {values[-1]:.1f}")

    double = [row for row in rows if row["dtype"] == "float64"]
    single = [row for row in rows if row["dtype"] != "float64"]
    lines = [("read bandwidth, all cores", *over("bandwidth", rows, "GB/s"))]
    lines += [("sgemm (NumPy)", *over("flops_per_second", single, "GFLOP/s"))] if single else []
    lines += [("dgemm (NumPy)", *over("flops_per_second", double, "GFLOP/s"))] if double else []
    title = f"What this machine can do: {found['cpu']}, {found['cores']} cores"
    note = "Measured in turn with the steps below."
    if found["load"] > 0.5:
        note += f" Other programs kept the machine busy (load {found['load']:.1f}): figures are pessimistic."
    return Table(title, ("ceiling", "median", "range"), lines, note)


def steps(rows: list[dict]) -> Table:
    """Everyone at every shape, the fastest first."""
    lines = []
    for row in rows:
        timed = {"fastnewton": row["step"], **row["others"]}
        for name in sorted(timed, key=lambda name: timed[name]["median"]):
            taken, held = timed[name]["median"], row["memory"].get(name)
            cells = (
                spread(timed[name]),
                f"{row['bytes'] / taken / 1e9:.1f}",
                ceilings(row),
                f"{100 * row['roofline'] / taken:.0f} %",
                f"{taken / row['step']['median']:.2f}",
                "" if held is None else f"{held / 1e6:,.1f}",
            )
            lines.append((row["shape"], name, milliseconds(taken), *cells))
    left_out = {f"{name} ({why})" for row in rows for name, why in row["left_out"].items()}
    note = (
        "Medians of interleaved rounds, each in another order; the spread is the distance of the quartiles, of few "
        "samples with their number. GB/s: the bytes that a step must move over the time; ceilings: GB/s that are read, "
        "GFLOP/s of a matrix product. Peak: MB beside the arrays handed in, during one call. Every result was checked "
        f"against float64 first. {ABOVE}"
    )
    note += f" Not timed: {'; '.join(sorted(left_out))}." if left_out else ""
    columns = ("shape", "", "ms", "spread", "GB/s", "ceilings", "of roofline", "time /ours", "peak MB")
    return Table("The step and its peers", columns, lines, note)


def spread(sample: dict) -> str:
    """Of one sample there is none."""
    told = f"{100 * sample['spread']:.0f} %" if sample["samples"] > 1 else "–"
    return told if sample["samples"] > FEW else f"{told} of {sample['samples']}"


def ceilings(row: dict) -> str:
    """What the step is held to: GB/s that are read and GFLOP/s that are multiplied."""
    return f"{row['bandwidth'] / 1e9:.1f}, {row['flops_per_second'] / 1e9:.0f}"


def losses(rows: list[dict]) -> Words:
    """The shapes at which a peer is faster, or as fast within a tenth."""
    compared = [row for row in rows if row["best_peer"]]
    said = [
        f"{row['shape']}: {row['best_peer']} takes {row['ratios']['best peer']:.2f} of our time."
        for row in compared
        if row["ratios"]["best peer"] < 1.1
    ]
    none = f"Nowhere: the step is the fastest at all {len(compared)} shapes." if compared else "No peer was timed."
    return Words("Where we lose, by the time of a step", said or [none])


def targets(rows: list[dict]) -> Table:
    """Whether each shape reaches what it is to reach."""
    lines = []
    for row in rows:
        if row["target"]:
            ratio = row["ratios"].get(row["target_ratio"])
            verdict = {True: "reached", False: "NOT reached", None: "no peer"}[row["reached"]]
            measured = f"{ratio:.2f}" if ratio else ""
            lines.append((row["shape"], row["target"], measured, spread(row["step"]), verdict))
    note = (
        "roofline/0.75: at most the roofline time divided by 0.75; 4.5 × best peer: at least 4.5 times faster. "
        "The spread is that of the step: the distance of its quartiles."
    )
    return Table("Targets", ("shape", "to reach", "measured", "spread", "verdict"), lines, note)


def on_device(found: dict | None) -> list[Table]:
    """The step on a CUDA device, if there was one, beside a copy and the peers."""
    if found is None:
        return []
    rows = found["steps"]
    names = sorted({name for row in rows for name in row["seconds"]} & {"CuPy", "PyTorch", "torch.compile", "JAX, jit"})
    lines = [
        (
            f"m = {row['m']}, n = {row['n']:,}, {row['dtype']}",
            milliseconds(row["roofline"]),
            milliseconds(row["seconds"]["step"]),
            f"{row['of_copy']:.2f}",
            f"{row['of_roofline']:.2f}",
            *(milliseconds(row["seconds"][name]) if name in row["seconds"] else "" for name in names),
        )
        for row in rows
    ]
    columns = ("shape", "roofline", "fastnewton", "of copy", "roofline /time", *names)
    note = "Times in ms. Of copy: bytes that must move / time, over the bandwidth of a device-to-device copy."
    return [Table(f"One step on {found['device']['device']}", columns, lines, note)]


def training(found: dict) -> Table:
    """What each method reached."""
    lines = [
        (
            method["name"],
            ", ".join(f"{key} {value:.3g}" for key, value in method["settings"].items()),
            f"{method['gradient_norms'][-1]:.1e}",
            f"{method['rate']:.4f}",
            f"{method['value']:.6f}",
            f"{100 * method['accuracy']:.1f} %",
        )
        for method in found["methods"]
    ]
    title = f"Training: {found['problem']}, n = {found['n']}, {found['workers']} workers"
    note = (
        f"After {found['evaluations']} full-batch gradients per worker (of SGD's batches, their share); "
        "DistNewton spends two a step. Step lengths were searched beforehand (local and asynchronous SGD take that "
        "of SGD), and the gradients of that search are not counted. The rate is the factor on ‖∇J‖ per gradient, "
        "over the second half. With fewer workers than parameters convergence is linear."
    )
    return Table(title, ("method", "settings", "‖∇J‖", "rate", "J", "training accuracy"), lines, note)


def quadratic(found: dict) -> Table:
    """Step by step."""
    norms = found["gradient_norms"]
    lines = [(str(k), f"{norm:.1e}") for k, norm in enumerate(norms)]
    title = f"Quadratic regime: {found['problem']}, n = {found['n']}, {found['workers']} workers"
    reached = "reached" if found["reached"] else "NOT reached"
    low, high = TARGET_ORDER
    note = f"Measured order of convergence: {found['order']:.2f} (to reach: {low} to {high}). "
    note += f"‖∇J‖ ≤ 1e-13: {reached}."
    return Table(title, ("step", "‖∇J‖"), lines, note)


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    value = 1e3 * seconds
    return f"{value:.3f}" if value < 1 else f"{value:.3g}" if value < 100 else f"{value:,.0f}"
