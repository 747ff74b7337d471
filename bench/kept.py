"""Results of named machines, kept under bench/results/, and README's table of them."""

import json
import re
import shutil
from pathlib import Path

from bench import exchange, fits
from bench.report import ABOVE, ROOT, Table, ceilings, milliseconds, spread

FOLDER, README = ROOT / "bench" / "results", ROOT / "README.md"
KEPT, PICTURE = ("bench", "peers", "scaling", "exchange"), "step_time.png"  # drawn from bench.json, shown in README
BEGIN, END = "<!-- measured: python -m bench report --readme -->", "<!-- end of measured -->"


def keep(files: dict[str, Path]) -> list[Path]:
    """Copy the results to the folder of the machine that they name, and README's picture; the copies."""
    copies = []
    for file in (file for name, file in files.items() if name in KEPT):
        target = folder(json.loads(file.read_text())["machine"])
        target.mkdir(exist_ok=True, parents=True)
        copies.append(Path(shutil.copy(file, target / file.name)))
        if file == files.get("bench"):
            copies.append(Path(shutil.copy(file.with_name(PICTURE), FOLDER)))
    return copies


def folder(machine: dict) -> Path:
    """Where results of a machine are kept."""
    return FOLDER / re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower())


def write_readme() -> Path:
    """Replace what stands between README's markers."""
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    if END not in rest:
        raise ValueError(f"{README} must have a line {BEGIN!r} and after it a line {END!r}")
    README.write_text(f"{head}{block()}{rest.partition(END)[2]}", encoding="utf-8")
    return README


def block() -> str:
    """What is to stand between README's markers, with these."""
    texts = [text for folder in sorted(FOLDER.iterdir()) if folder.is_dir() for text in _of_machine(folder)]
    return "\n\n".join([BEGIN, *texts, END])


def _of_machine(folder: Path) -> list[str]:
    found = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in KEPT if (folder / f"{name}.json").exists()
    }
    texts = []
    if "peers" in found:
        texts.append(_peers(found["peers"]).markdown().partition("\n\n")[2])
    if "scaling" in found:
        texts.append(_scaling(found["scaling"]))
    if "exchange" in found and (row := exchange.at_target(found["exchange"]["exchange"])):
        texts.append(_exchange(row, found["exchange"]["command"]))
    return texts


def _peers(found: dict) -> Table:
    machine, rows = found["machine"], found["steps"]
    lines = []
    for row in rows:
        peer, ratio = row["best_peer"] or "", row["ratios"].get("best peer")
        share = f"{100 * row['ratios']['roofline']:.0f} %"
        taken = row["step"]["median"]
        ours = (milliseconds(taken), spread(row["step"]), f"{row['bytes'] / taken / 1e9:.1f}", ceilings(row), share)
        theirs = (peer, spread(row["others"][peer]), f"{ratio:.1f}") if peer else ("", "", "")
        lines.append((row["shape"], *ours, *theirs))
    title = f"{machine['cpu']}, {machine['cores']} cores"
    note = (
        f"{title}; `{found['command']}`: medians, the distance of their quartiles (of few samples with their number), "
        f"ceilings in GB/s and GFLOP/s; times faster than the best peer of the same run. {ABOVE}"
    )
    columns = (title, "ms", "spread", "GB/s", "ceilings", "of roofline", "best peer", "its spread", "times faster")
    return Table(title, columns, lines, note)


def _scaling(found: dict) -> str:
    gram, where = fits.farthest(found["fits"], "gram")
    value, low, high = ("∞" if number is None else f"{number:.0f}" for number in gram["crossover"])
    return (
        f"In one process gram's m²n overtakes mn at m ≈ {value}{where} (95 %: {low} to {high}; `{found['command']}`); "
        "sharded, a rank's work is O(m³ + mn)."
    )


def _exchange(row: dict, command: str) -> str:
    plain, sharded, gathered = (row["seconds"][name] for name in ("allreduce", "sharded", "allgather"))
    return (
        f"Over MPI with 4 ranks and n = {row['n']:,} the all-reduce of a gradient takes "
        f"{milliseconds(plain)} ms, a sharded step {milliseconds(sharded)} ({sharded / plain:.2f} times as long), "
        f"the allgather's {milliseconds(gathered)} (`{command}`)."
    )
