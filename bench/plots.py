"""The pictures."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from bench import network, roofline
from bench import regimes as design
from bench.claims import NAMES, TUNED, View
from bench.figure1 import MOMENTUM, PAPER_LRS, WORKERS
from bench.quadratic import SMALLEST
from bench.verdict import MARGIN

COLOURS = {
    "fastnewton": "#c1121f",
    "NumPy, literal": "#8d99ae",
    "NumPy, BLAS": "#3a5a80",
    "PyTorch": "#e09f3e",
    "JAX, jit": "#588157",
    "DistNewton": "#c1121f",
    "gradient descent": "#3a5a80",
    "SGD": "#8d99ae",
    "momentum SGD": "#e09f3e",
    "local SGD": "#588157",
    "asynchronous SGD": "#7b5ea7",
}
PART_COLOURS = {"gram": "#c1121f", "combine": "#3a5a80", "spectrum": "#e09f3e"}
STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def step_time(rows: list[dict], machine: dict, folder: Path) -> str:
    """Time of a step against n, beside the memory floor and the peers."""
    rows = sorted(rows, key=lambda row: row["n"])
    n = np.array([row["n"] for row in rows])
    bandwidth = float(np.median([row["bandwidth"] for row in rows]))
    floor = np.array([row["bytes"] for row in rows]) / bandwidth
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5))
        for name in [name for name in COLOURS if name in rows[-1]["others"]]:
            points = [(row["n"], row["others"][name]["median"]) for row in rows if name in row["others"]]
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], lw=1.2, ms=3.5, label=name)
        mine = [row["step"]["median"] for row in rows]
        axes.plot(n, mine, "o-", color=COLOURS["fastnewton"], lw=2.4, ms=5, zorder=5, label="fastnewton")
        axes.plot(n, floor, "--", color="black", lw=1.2, label=f"memory floor, at {bandwidth / 1e9:.0f} GB/s")
        axes.fill_between(n, floor, floor[0] / 2, color="#f4f4f4", lw=0, zorder=0)
        axes.set(xscale="log", yscale="log", xlim=(n[0], n[-1] * 1.15), ylim=(floor[0] / 2, None))
        axes.set(xlabel="n, number of parameters", ylabel="time of one step")
        _in_seconds(axes)
        axes.set_title(f"One quasi-Newton step, m = {rows[0]['m']} workers, {rows[0]['dtype']}", pad=20)
        _subtitle(
            axes,
            f"{machine['cpu']}, {machine['cores']} cores; medians; floor = (3m + 1)·n·itemsize / bandwidth",
        )
        axes.legend(loc="lower right")  # nothing can be faster than the floor: this corner is empty
        return _save(figure, folder, "step_time.png")


def training(found: dict, folder: Path) -> str:
    """‖∇J‖ against gradients per worker, for each method."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5))
        for method in found["methods"]:
            name, norms = method["name"], method["gradient_norms"]
            label = name if "SGD" in name else f"{name}: × {method['rate']:.4f} per gradient"
            axes.plot(method["evaluations"], norms, color=COLOURS[name], lw=1.8, label=label)
        axes.set(yscale="log", xlim=(0, found["evaluations"]))
        axes.set(xlabel="full-batch gradients evaluated by each worker", ylabel="‖∇J‖")
        axes.set_title(
            f"Fewer workers than parameters (m = {found['workers']}, n = {found['n']}): linear convergence",
            pad=20,
        )
        _subtitle(axes, f"{found['problem']}, L2 {found['l2']:g}; fixed steps, the best for each method")
        axes.legend(loc="lower left")
        return _save(figure, folder, "training.png")


def quadratic(found: dict, folder: Path) -> str:
    """‖∇J‖ against steps, and each norm against the one before it."""
    norms = np.array(found["gradient_norms"])
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
        left.plot(norms, "o-", color=COLOURS["DistNewton"], lw=1.8)
        left.axhline(SMALLEST, color="black", ls="--", lw=1)
        left.text(0, SMALLEST / 4, "1e-13: rounding", va="top")
        left.set(yscale="log", ylim=(norms.min() / 30, None), xlabel="step", ylabel="‖∇J‖")
        left.set_title(f"m = {found['workers']} workers, n = {found['n']}: quadratic convergence", pad=20)
        _subtitle(left, f"{found['problem']}, L2 {found['l2']:g}")
        above = norms[norms > SMALLEST]
        right.loglog(above[:-1], above[1:], "o", color=COLOURS["DistNewton"], label="measured")
        right.loglog(above[:-1], above[-1] * (above[:-1] / above[-2]) ** 2, "--", color="black", lw=1, label="slope 2")
        right.set(xlabel="‖∇J‖ before the step", ylabel="‖∇J‖ after the step")
        right.set_title(f"measured order {found['order']:.2f}", pad=20)
        right.legend(loc="upper left")
        return _save(figure, folder, "quadratic.png")


def exchanges(rows: list[dict], here: network.Network, folder: Path) -> str:
    """Time against n on this machine, measured and as the model has it, and on a network."""
    colours = {"allreduce": COLOURS["SGD"], "sharded": COLOURS["DistNewton"], "allgather": COLOURS["NumPy, BLAS"]}
    names = {"allreduce": "all-reduce of the gradient", "sharded": "sharded", "allgather": "allgather"}
    far, ranks = "100 Gb/s InfiniBand", 4
    rows = [row for row in rows if row["ranks"] == ranks]
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
        for kind, colour in colours.items():
            points = [(row["n"], row["seconds"][kind]) for row in rows if kind in row["seconds"]]
            left.loglog(*zip(*points, strict=True), "o", color=colour, label=names[kind])
            n = np.geomspace(points[0][0], points[-1][0], 50)
            left.loglog(n, [network.seconds(here, kind, ranks, int(k)) for k in n], color=colour, lw=1)
            n = np.geomspace(1e4, 1e11, 60)
            for m, style in ((16, "-"), (256, "--")):
                times = [network.seconds(network.NAMED[far], kind, m, int(k)) for k in n]
                right.loglog(n, times, style, color=colour, lw=1.5, label=f"{names[kind]}, m = {m}")
        for axes, title, words in (
            (left, f"{ranks} ranks on this machine", "points measured, lines the fitted model"),
            (right, far, "predicted; one rank per socket and link"),
        ):
            axes.set(xlabel="n, number of parameters", ylabel="time of one step")
            axes.set_title(title, pad=20)
            _in_seconds(axes)
            _subtitle(axes, words)
            axes.legend(fontsize=8)
        return _save(figure, folder, "exchanges.png")


def figure1(found: dict, folder: Path) -> str:
    """Negative log-likelihood against gradients per worker: at the paper's step length and at each method's best."""
    columns = [("own", PAPER_LRS[0]), ("own", TUNED), ("diff", TUNED)]
    shades = plt.get_cmap("Reds")(np.linspace(0.35, 0.95, len(WORKERS)))
    with plt.style.context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(13, 8))
        for (row, data), (column, (protocol, rate)) in itertools.product(enumerate(NAMES), enumerate(columns)):
            axes, at = grid[row, column], View(found, data, protocol, rate)
            curves = [(f"DistNewton-{m}", at.newton(m), shades[k], "-") for k, m in enumerate(WORKERS)]
            curves.append(("SGD", at.sgd(), "black", "-"))
            if data == "cifar10":
                curves.append(("SGD, ReLU", at.sgd(activation="relu"), COLOURS["NumPy, BLAS"], "-"))
            if rate == TUNED:
                curves.append(("momentum SGD", at.sgd(momentum=MOMENTUM), COLOURS["momentum SGD"], "-"))
            curves.append(("local SGD-8", at.newton(8, max_rank=0), COLOURS["local SGD"], "-"))
            curves.append(("DistNewton-8 without Newton's part", at.newton(8, ablation=True), shades[-1], ":"))
            curves.append(("DistNewton-8, τ ≤ 1/σ_1", at.newton(8, lr_cap="sigma"), shades[-1], "--"))
            for label, one, colour, line in curves:
                mean, spread = (np.array(one[key], float) for key in ("mean", "spread"))
                axes.plot(one["evaluations"], mean, line, color=colour, lw=1.6, label=label)
                axes.fill_between(one["evaluations"], mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
            axes.set(yscale="log" if rate == TUNED else "linear", ylabel="training NLL")
            if data == "cifar10":  # less than a decade
                axes.yaxis.set_minor_formatter("{x:.3g}")
            axes.yaxis.set_major_formatter("{x:.4g}")
            axes.set(xlabel="gradients evaluated by each worker")
            axes.set_title(f"{NAMES[data]}, “{protocol}”, lr {rate}", pad=20)
            _subtitle(axes, f"{curves[0][1]['run']['samples']:,} images; band: standard deviation over the seeds")
            axes.legend(fontsize=7)
        return _save(figure, folder, "figure1.png")


def scaling(found: dict, folder: Path) -> str:
    """Time against n with the floor, time against m, and the shares of the parts."""
    cubed = {row["m"]: row["seconds"]["spectrum"] for row in found["eigenproblem"]}
    rows = {
        (row["m"], row["n"]): row["seconds"]
        | {"spectrum": cubed[row["m"]], "floor": roofline.step(row["m"], row["n"], 4).bytes / row["bandwidth"]}
        for row in found["scaling"]
        if row["sharded"] is None
    }
    ms = sorted({m for m, _ in rows})
    at = max(n for _, n in rows if all((m, n) in rows for m in ms))  # the longest that all m share
    with plt.style.context(STYLE):
        figure, (over_n, over_m, shares) = plt.subplots(3, 1, figsize=(8, 13))
        for m, colour in zip(ms, plt.colormaps["viridis"](np.linspace(0, 0.9, len(ms))), strict=True):
            lengths = sorted(n for other, n in rows if other == m)
            total = [sum(rows[m, n][part] for part in PART_COLOURS) for n in lengths]
            over_n.loglog(lengths, total, "o-", color=colour, ms=3, label=f"m = {m}")
            over_n.loglog(lengths, [rows[m, n]["floor"] for n in lengths], "--", color=colour, lw=0.8)
        parts = {part: np.array([rows[m, at][part] for m in ms]) for part in PART_COLOURS}
        for part, times in parts.items():
            over_m.loglog(ms, times, "o-", color=PART_COLOURS[part], label=part)
        over_m.loglog(ms, [rows[m, at]["floor"] for m in ms], "--", color="black", lw=1, label="memory floor of a step")
        stack = np.array(list(parts.values())) / sum(parts.values())
        shares.stackplot(ms, stack, labels=list(parts), colors=PART_COLOURS.values())
        shares.set(xscale="log", xlim=(ms[0], ms[-1]), ylim=(0, 1))
        for axes, title, words, x, y in (
            (
                over_n,
                "Time against n",
                "dashed: a step's bytes at the bandwidth measured beside it",
                "parameters n",
                "time",
            ),
            (over_m, f"Time against m, n = {at:,}", found["device"], "workers m", "time"),
            (shares, f"Shares of the parts, n = {at:,}", "one process", "workers m", "share"),
        ):
            axes.set(xlabel=x, ylabel=y)
            axes.set_title(title, pad=20)
            _subtitle(axes, words)
            axes.legend(fontsize=8, ncols=2, loc="upper left", frameon=True)
            if y == "time":
                _in_seconds(axes)
            if x == "workers m":
                axes.set_xticks(ms, [str(m) for m in ms])
                axes.minorticks_off()
        return _save(figure, folder, "scaling.png")


def regimes(found: dict, folder: Path) -> str:
    """Gain over first-order methods by noise, conditioning and workers, over all settings drawn; and against m."""
    rows = [row for part in ("rows", "confirmed") for row in design.unpacked(found[part])]
    quadratics = [row for row in rows if "condition" in row]
    exact = [row for row in quadratics if row["level"] == "exact"]
    others = [row for row in rows if "condition" not in row]
    maps = [
        ("Quadratics, n = 60", quadratics, "level", design.LEVELS),
        ("Quadratics, exact gradients", exact, "condition", design.CONDITIONS),
        ("Classification, exact", [row for row in others if row["level"] == "exact"], "family", None),
        ("Classification, noisy", [row for row in others if row["level"] != "exact"], "family", None),
    ]
    with plt.style.context({**STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(2, 4, figsize=(15, 7.5))
        for (up, target), (across, (title, some, key, values)) in itertools.product(
            enumerate(design.TARGETS), enumerate(maps)
        ):
            axes, workers = grid[up, across], sorted({row["workers"] for row in some})
            values = values or list(dict.fromkeys(row[key] for row in some))
            for (x, value), (y, m) in itertools.product(enumerate(values), enumerate(workers)):
                gains = [row[target] for row in some if row[key] == value and row["workers"] == m]
                if gains:
                    best, won = max(gains), np.mean(np.array(gains) > MARGIN)
                    shade = plt.get_cmap("RdBu")(0.5 + np.clip(best, -2, 2) / 4)
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=shade, lw=0))
                    dark = abs(best) > 1.2
                    axes.text(
                        x,
                        y,
                        f"{round(best, 1) + 0.0:+.1f}\n{won:.0%}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="w" if dark else "k",
                    )
            names = [
                str(value).replace(", ", ",\n")
                if key == "family"
                else f"κ = {value:,}"
                if key == "condition"
                else value
                for value in values
            ]
            axes.set_xticks(range(len(values)), names, fontsize=8)
            axes.set_yticks(range(len(workers)), [str(m) for m in workers])
            axes.set(xlim=(-0.5, len(values) - 0.5), ylim=(-0.5, len(workers) - 0.5), ylabel="workers m")
            axes.set_title(title, pad=20)
            _subtitle(axes, f"equal gradients {'in ' if target == 'total' else ''}{target}")
        figure.suptitle(
            "DistNewton against the better of gradient descent and momentum: gain of the best setting, in decades of J "
            "above its minimum (blue: it wins), and the share of the settings that win",
            fontsize=10,
        )
        return _save(figure, folder, "regimes.png")


def gpu(rows: list[dict], folder: Path) -> str:
    """Share of the copy bandwidth against n, for each m, in float32."""
    rows = [row for row in rows if row["dtype"] == "float32"]
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5))
        for m in sorted({row["m"] for row in rows}):
            shares = {row["n"]: row["of_copy"] for row in rows if row["m"] == m}
            axes.plot(*zip(*sorted(shares.items()), strict=True), "o-", lw=1.4, ms=3.5, label=f"m = {m}")
        axes.axhline(1.0, color="black", ls="--", lw=1)
        axes.set(xscale="log", ylim=(0, None), xlabel="n, number of parameters", ylabel="share of the copy bandwidth")
        axes.set_title("One quasi-Newton step on a CUDA device, float32", pad=20)
        _subtitle(axes, "bytes that must move / time, over the bandwidth of a device-to-device copy in the same run")
        axes.legend(ncols=2, fontsize=8)
        return _save(figure, folder, "gpu.png")


def _subtitle(axes: Axes, text: str) -> None:
    axes.text(0, 1.015, text, transform=axes.transAxes, color="#666666", fontsize=9)


def _in_seconds(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(EngFormatter("s"))


def _save(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / name)
    plt.close(figure)
    return name
