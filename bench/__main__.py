"""The command line: `python -m bench --help`."""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import (
    claims,
    compare,
    exchange,
    figure1,
    gpu,
    kept,
    network,
    page,
    peers,
    plots,
    problems,
    quadratic,
    regimes,
    regression,
    report,
    scaling,
    short,
    train,
    verdict,
)
from bench.ceilings import machine, read_ceiling

DESCRIPTION = """\
Benchmarks of fastnewton.

Without a sub-command, in at most 3 minutes on 2 cores with the bundled digits: what this machine can do, the step's
time beside the memory floor and what one would write instead, training over 4 MPI ranks, and the quadratic regime.
Every run writes a page in HTML and Markdown, a JSON file with all figures, and plots; this one ends with the report.
"""
PEERS = """\
The step against the roofline of this machine and against NumPy, SciPy, PyTorch and JAX (where installed), shape by
shape, each with what it is to reach; on a CUDA device too, beside CuPy.  Ceilings, step and peers are timed in turn, in
another order each round; figures are medians.  About 8 minutes.
"""
TRAIN = """\
Multinomial logistic regression on handwritten digits, n = 650, over MPI ranks: DistNewton beside gradient
descent, and SGD plain, with momentum, local and asynchronous, at equal numbers of gradients; then two classes,
n = 20, with more workers than parameters.  About 4 minutes.
"""
EXCHANGE = """\
The sharded and the allgather exchange of DistNewton over 2, 4 and 8 MPI ranks on this machine, n from 2^14 to 2^24,
beside the all-reduce of the gradient: time, bytes sent, memory per rank.  Then a model of latency and bandwidth,
fitted to every other n and checked on the rest, and what it says of clusters: m to 256, n to 10^11.  About 4
minutes; with --quick less than 1, and without the model.
"""
FIGURE1 = """\
The paper's experiment: a 5-layer convnet of about 16,000 parameters on MNIST and CIFAR-10, global batch 256, over 1,
2, 4 and 8 MPI ranks: DistNewton beside SGD, momentum, local SGD and itself without Newton's part, and the paper's
claims beside what was found.  Needs PyTorch.  An estimated 65 minutes on 2 cores, with the first 8,192 and 4,864
images; a file for each run is written to OUT/figure1/.
"""
REGIMES = """\
Where the step wins: some hundred random settings on quadratics, logistic regression and a tanh network, exact and noisy
gradients, beside tuned gradient descent, momentum and L-BFGS at equal numbers of gradients, per worker and in total;
whether fn.diagnostics predicts it on families left out; recommended settings.  An estimated 10 minutes on 2
cores; with --quick about 1.
"""
SCALING = """\
Is the step O(m³ + mn)?  gram, combine and spectrum over m = 2 ... 512 and n = 2^12 ... 2^26, what a rank of the sharded
exchange computes, and asynchronous Writes; models fitted to the times, with confidence intervals; peak memory.  About 6
minutes; with --quick less than 2.
"""
REGRESSION = """\
Runs the benchmarks of `pytest bench --benchmark-only` and compares them, as ratios of time to roofline, with the
baseline of this CPU under bench/results/, and bytes, memory held and messages with those of all machines.  Ends with
status 1 where something is slower, or moves or holds another amount.  Half a minute; with --invariants no
time is judged, on any machine; with --update, 3 minutes on an idle machine, what is measured now is the baseline.
"""
REPORT = """\
One page in HTML and Markdown of all that the sub-commands have written to --out.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = argparse.Namespace(**DEFAULTS | vars(_parser().parse_args(arguments)))
    options.command = " ".join(["python -m bench", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out must be a folder that can be written; {error}") from error
    machine()  # looks at the load before this program makes some
    try:
        options.run(options, Console(width=None if sys.stdout.isatty() else 160))
    except problems.MissingData as error:
        raise SystemExit(str(error)) from error


def run_all(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench`"""
    if options.data is not None:
        problems.training_files("mnist", options.data)  # what is missing is told before the peers are timed
    shapes = compare.curve(largest=20 if options.quick else 23)
    steps = _measured(shapes, [name for name in peers.installed() if name in peers.QUICK], options, 8.0, console)
    on_device = _measured_on_device(console)
    _finish(options, console, "bench", {"steps": steps, "gpu": on_device, **_trained(options, console)})
    run_report(options, console)


def run_peers(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench peers`"""
    table = compare.table(24 if options.quick else 26)
    words = [""] if options.peers is None else [word.lower() for word in options.peers]
    chosen = [name for name in peers.installed() if any(word in name.lower() for word in words)]
    steps = _measured([table[name] for name in options.shapes or table], chosen, options, 60.0, console)
    parts = short.measure(options.rounds or (5 if options.quick else 15))
    _finish(options, console, "peers", {"steps": steps, "short": parts, "gpu": _measured_on_device(console)})


def run_train(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench train`"""
    _finish(options, console, "train", _trained(options, console, baselines=True))


def run_exchange(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench exchange`"""
    largest = 18 if options.quick else 24
    with _progress(console, len(exchange.RANKS) * len(exchange.lengths(largest))) as (say, advance):
        say("MPI ranks")
        rows = exchange.measure(largest, options.rounds or (5 if options.quick else 15), advance)
    model = None if options.quick else dataclasses.asdict(network.measured(rows))  # short vectors tell no bandwidth
    _finish(options, console, "exchange", {"exchange": rows, "model": model})


def run_figure1(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench figure1`"""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("figure1 trains with PyTorch, which is not installed: pip install 'fastnewton[train]'")
    scale = figure1.SCALES["full" if options.full else "quick" if options.quick else "default"]
    folder, data = options.out / "figure1", options.data or problems.default_folder()
    folder.mkdir(exist_ok=True)

    def trained(runs: list[figure1.Run], what: str) -> list[dict]:
        left = figure1.missing(runs, folder) if options.resume else runs
        console.print(f"{what}: {len(left)} runs, about {figure1.estimate(left) / 60:.0f} minutes", highlight=False)
        with _progress(console, len(left)) as (say, advance):
            say(what)
            figure1.execute(left, folder, data, options.command, advance)
        return figure1.summary(runs, folder)

    searched = trained(figure1.tuning(scale), "search for step lengths")
    best = figure1.tuned(searched)
    found = {"tuned": best, "tuning": searched, "settings": trained(figure1.plan(scale, best), "training")}
    _finish(options, console, "figure1", found)
    full = figure1.SCALES["full"]
    hours = figure1.estimate(figure1.tuning(full) + figure1.plan(full, best)) / 3600
    console.print(f"--full, all images of the full data sets and 50 epochs: about {hours:.0f} hours", highlight=False)


def run_regimes(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench regimes`"""
    counts, evaluations = ((24, 12), 16) if options.quick else ((480, 240), regimes.EVALUATIONS)
    drawn = regimes.design(counts[0], seed=0)
    with _progress(console, len(drawn)) as (say, advance):
        say("random settings")
        rows = regimes.run(drawn, evaluations, advance)
    effects = verdict.effects(rows)
    best = verdict.recommended(effects)
    again = regimes.design(counts[1], seed=1, best=best)
    with _progress(console, len(again)) as (say, advance):
        say("recommended settings")
        fresh = regimes.run(again, evaluations, advance)
    found = {"evaluations": evaluations, "effects": effects, "recommended": best}
    found |= {"prediction": verdict.prediction(rows + fresh)}
    found |= {"rows": regimes.packed(rows), "confirmed": regimes.packed(fresh)}
    _finish(options, console, "regimes", found)


def run_scaling(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench scaling`"""
    rounds, shapes = options.rounds or (3 if options.quick else 5), scaling.shapes(options.quick, options.device)
    with _progress(console, len(shapes) + 1) as (say, advance):
        say("memory")
        held = scaling.memory_held() if options.device == "cpu" else []
        say("ceiling and eigenproblem")
        on = scaling.side(options.device)
        cubes, rows = scaling.eigenproblems(on, rounds, options.quick), []
        advance()
        for shape in shapes:
            say(f"m = {shape.m}, n = {shape.n:,}")
            rows.append(scaling.measure(shape, on, rounds))
            advance()
    found = {"device": on.name, "cache": on.cache, "scaling": rows, "eigenproblem": cubes, "memory": held}
    _finish(options, console, "scaling", found | {"fits": scaling.fitted(rows, cubes, on.cache)})


def run_regression(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench regression`"""
    if options.update:
        _say_written(console, regression.update())
        return
    baseline, expected = regression.read()
    verdicts = regression.guard({} if options.invariants else baseline, expected)
    _finish(options, console, "regression", {"verdicts": verdicts})
    raise SystemExit(int(any(one.failed for one in verdicts)))


def run_report(options: argparse.Namespace, console: Console) -> None:
    """`python -m bench report`"""
    written = {name: options.out / f"{name}.json" for name in PARTS}
    found = {name: json.loads(file.read_text()) for name, file in written.items() if file.exists()}
    if not found and not options.readme:
        raise SystemExit(f"no results under {options.out}: run `python -m bench` or a sub-command first")
    sections = {name: (results, PARTS[name](results, options.out)) for name, results in found.items()}
    files = page.write(options.out, "report", sections) if found else []
    if options.readme:
        files += [*kept.keep({name: written[name] for name in found}), kept.write_readme()]
    _say_written(console, files)


# -- from results to what is shown ----------------------------------------------------------------------------


def _overview(found: dict, folder: Path) -> list[page.Part]:
    picture = report.Picture("Time of a step against n", plots.step_time(found["steps"], found["machine"], folder))
    return [*_peers(found, folder), picture, *_training(found, folder)]


def _peers(found: dict, folder: Path) -> list[page.Part]:
    rows, targets = found["steps"], report.targets(found["steps"])
    parts = [report.machine(found["machine"], rows), report.losses(rows), *([targets] if targets.rows else [])]
    tables = (short.table, short.threads_table, short.compile_table) if "short" in found else ()
    return [*parts, report.steps(rows), *(table(found["short"]) for table in tables), *report.on_device(found["gpu"])]


def _training(found: dict, folder: Path) -> list[page.Part]:
    many, few = found["training"], found["quadratic"]
    return [
        report.training(many),
        report.Picture("Gradient norm against gradients per worker", plots.training(many, folder)),
        report.quadratic(few),
        report.Picture("Quadratic regime", plots.quadratic(few, folder)),
    ]


def _exchange(found: dict, folder: Path) -> list[page.Part]:
    rows = found["exchange"]
    if found["model"] is None:
        return [exchange.table(rows)]
    here = network.Network(**found["model"])
    picture = report.Picture("The exchanges against n", plots.exchanges(rows, here, folder))
    return [exchange.table(rows), network.check(here, rows), picture, network.predictions()]


def _scaling(found: dict, folder: Path) -> list[page.Part]:
    rows, cubes, fits = found["scaling"], found["eigenproblem"], found["fits"]
    return [
        scaling.answer(fits, rows, cubes),
        report.Picture("Time over m and n, and the shares of the parts", plots.scaling(found, folder)),
        scaling.fits_table(fits),
        scaling.sharded_table(rows, cubes, fits),
        *([scaling.memory_table(found["memory"])] if found["memory"] else []),
    ]


def _regression(found: dict, folder: Path) -> list[page.Part]:
    return [regression.table([regression.Verdict(*one) for one in found["verdicts"]])]


def _figure1(found: dict, folder: Path) -> list[page.Part]:
    picture = report.Picture("The paper's experiment", plots.figure1(found, folder))
    return [claims.table(found), picture, claims.settings(found)]


def _regimes(found: dict, folder: Path) -> list[page.Part]:
    picture = report.Picture("Where the step wins", plots.regimes(found, folder))
    return [verdict.winners(found), picture, verdict.settings(found), verdict.predictions(found)]


PARTS: dict[str, Callable[[dict, Path], list[page.Part]]] = {
    "bench": _overview,
    "peers": _peers,
    "scaling": _scaling,
    "exchange": _exchange,
    "train": _training,
    "figure1": _figure1,
    "regimes": _regimes,
    "regression": _regression,
}
DEFAULTS = {
    "run": run_all,
    "out": report.OUT,
    "quick": False,
    "full": False,
    "resume": False,
    "shapes": None,
    "rounds": None,
    "peers": None,
    "device": "cpu",
    "readme": False,
    "update": False,
    "invariants": False,
    "data": None,
    "samples": None,
    "evaluations": train.EVALUATIONS,
    "ranks": train.RANKS,
    "seed": 0,
}


def _measured(
    shapes: list[compare.Shape], chosen: list[str], options: argparse.Namespace, limit: float, console: Console
) -> list[dict]:
    rounds = options.rounds or (5 if options.quick else 7)
    with _progress(console, len(shapes) * rounds) as (say, advance):
        say("ceilings")
        read_ceiling()
        rows = []
        for shape in shapes:
            say(shape.label)
            rows.append(compare.measure(shape, rounds=rounds, limit=limit, chosen=chosen, after_round=advance))
    return rows


def _measured_on_device(console: Console) -> dict | None:
    if not gpu.available():
        return None
    cases = gpu.headline(26)
    with _progress(console, len(cases)) as (say, advance):
        rows = []
        for case in cases:
            say(f"CUDA device, m = {case.m}, {case.dtype}")
            rows.append(gpu.measure(case))
            advance()
    return {"device": gpu.device(), "steps": rows}


def _trained(options: argparse.Namespace, console: Console, baselines: bool = False) -> dict:
    with _progress(console, train.runs(baselines) + 1) as (say, advance):
        say(f"training, {options.ranks} MPI ranks")
        many = train.train(
            data=options.data,
            samples=options.samples,
            evaluations=options.evaluations,
            ranks=options.ranks,
            seed=options.seed,
            baselines=baselines,
            after=advance,
        )
        say("quadratic regime")
        few = quadratic.solve(problems.digits(options.data, options.samples), seed=options.seed)
        advance()
    return {"training": many, "quadratic": few}


def _finish(options: argparse.Namespace, console: Console, name: str, results: dict) -> None:
    """Write name.json, and print and write what it says."""
    data = options.out / f"{name}.json"
    results = {"command": options.command, "machine": machine(), **results}
    data.write_text(json.dumps(results, indent=1))
    parts = PARTS[name](results, options.out)
    for part in parts:
        part.print(console)
    if options.quick:
        console.print("\n--quick shows that all runs; what it finds rests on little.", highlight=False)
    pictures = [options.out / part.file for part in parts if isinstance(part, report.Picture)]
    _say_written(console, [data, *page.write(options.out, name, {name: (results, parts)}), *pictures])


def _say_written(console: Console, files: list[Path]) -> None:
    console.print("written:", *map(str, files), sep="\n  ", highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar, and functions to say what is done and to move on; drawn only then, so as not to disturb."""
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def say(text: str) -> None:
            bar.update(task, description=text, refresh=True)

        def advance() -> None:
            bar.update(task, advance=1, refresh=True)

        yield say, advance


def _parser() -> argparse.ArgumentParser:
    """Options may stand before or after the sub-command; what is not given is taken from DEFAULTS."""
    parser = _parser_for(argparse.ArgumentParser, "python -m bench", DESCRIPTION)
    commands = parser.add_subparsers(title="sub-commands", metavar="COMMAND")
    _add_timing(parser)
    _add_training(parser)
    for name, run, said, text, *additions in (
        ("peers", run_peers, "the step against roofline and peers", PEERS, _add_timing, _add_peers),
        ("scaling", run_scaling, "time and memory over m and n", SCALING, _add_timing, _add_rounds, _add_device),
        ("train", run_train, "training over MPI ranks", TRAIN, _add_training),
        ("exchange", run_exchange, "the exchanges over MPI", EXCHANGE, _add_timing, _add_rounds),
        ("figure1", run_figure1, "the paper's experiment", FIGURE1, _add_figure1),
        ("regression", run_regression, "whether it is as fast as it was", REGRESSION, _add_regression),
        ("regimes", run_regimes, "where the step wins, and what predicts it", REGIMES, _add_timing),
        ("report", run_report, "one page of all results", REPORT, _add_readme),
    ):
        made = _parser_for(commands.add_parser, name, text, help=said)
        made.set_defaults(run=run)
        for add in additions:
            add(made)
    return parser


def _parser_for(make: Callable[..., argparse.ArgumentParser], name: str, text: str, **more) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    found = make(name, description=text, formatter_class=style, argument_default=argparse.SUPPRESS, **more)
    found.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: bench/out)")
    return found


def _add_timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a shorter run")


def _add_peers(parser: argparse.ArgumentParser) -> None:
    names = list(compare.table())
    parser.add_argument("--shapes", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (all)")
    _add_rounds(parser)
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME",
        help=f"only those with these words in their names: {', '.join(peers.ALL)}",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to measure on (cpu)")


def _add_readme(parser: argparse.ArgumentParser) -> None:
    told = "also keep this machine's results under bench/results/ and rewrite README's table and picture from them"
    parser.add_argument("--readme", action="store_true", help=told)


def _add_regression(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--invariants", action="store_true", help="judge bytes, memory and messages alone, no times")
    chosen.add_argument("--update", action="store_true", help="write the baseline of this CPU and the invariants")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=_positive, metavar="N", help="rounds of timing; quick: fewer")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="?",
        const=problems.default_folder(),
        metavar="PATH",
        help="folder with MNIST in IDX format (also .gz, also in a sub-folder mnist/); without PATH: "
        "$FASTNEWTON_DATA or data/; without --data: scikit-learn's bundled digits",
    )
    parser.add_argument("--samples", type=_positive, metavar="N", help="only the first N images")
    parser.add_argument(
        "--evaluations", type=_positive, metavar="N", help=f"gradients per worker ({train.EVALUATIONS})"
    )
    parser.add_argument("--ranks", type=_positive, metavar="N", help=f"MPI ranks, one worker each ({train.RANKS})")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random spread of the workers (0)")


def _add_figure1(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="1,024 images, 4 epochs, one seed: 5 minutes")
    length.add_argument("--full", action="store_true", help="all images of the full data sets, 50 epochs: hours")
    parser.add_argument("--resume", action="store_true", help="skip runs that have left their file")
    parser.add_argument("--data", metavar="PATH", help="folder with mnist/ and cifar10/ ($FASTNEWTON_DATA or data/)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    main()
