"""Say what differs between two results of compute.py (.npz) or of assembly.py (.json).

    python compare.py BASE NEW [--allow REGEX]... [--show COUNT]

Values may differ, within a tolerance and with the same rank, reason and errors, in guarded and curvature-capped steps
and in what follows from an eigenproblem of more than 128 workers.  --allow takes names of further entries, whole.
Anything else that differs is a fault, status 1; results of different hosts or versions cannot be compared, status 2.
Assembly says nothing of bits: OWED, status 1 too, is a benchmark, where a loop with multiply-adds is another.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import store

EXACT = ("info.rank", "info.accepted", "info.reason", "info.dropped", "rank", "error", "version", "traffic")
FOLLOWS = ("singular_values", "vectors", "coefficients", "captured", "lr", "lr_rest", "theta")
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def allowed_class(name):
    """The class of an entry that may change, or None."""
    field = name.rsplit("/", 1)[1]
    m = re.search(r"\bm=(\d+)", name)
    if field in EXACT:
        return None
    if m and int(m[1]) > 128:
        follows = field.removeprefix("info.") in FOLLOWS or field.startswith(("of.", "info.diagnostics"))
        return "m > 128" if follows and not name.startswith(("combine", "gram")) else None
    if field == "info.singular_values" or field.startswith("info.diagnostics"):  # before the decision
        return None
    if "safeguards(" in name:
        return "guarded"
    return "capped" if "lr_cap=curvature" in name else None


def apart(name, base, new):
    """How far the numbers of an entry are apart, in units of what rounding explains."""
    first, second = store.numbers(*base), store.numbers(*new)
    if first is None or base[0] != new[0] or first.shape != second.shape:
        return np.inf
    if name.endswith("/vectors"):  # signs are free, and so are the bases of clusters
        return 0.0
    if not (np.isfinite(first) == np.isfinite(second)).all():
        return np.inf
    finite = np.isfinite(first)
    first, second = first[finite], second[finite]
    scale = np.abs(first).max(initial=0.0)
    kind = next((kind for kind in EPS if kind in base[0]), "float64")
    room = (1e-2 if "steep" in name or "cutoff=1e-" in name else 1e-6) + 4 * EPS[kind]
    scale = scale or 1e-300
    return float(np.abs(first / scale - second / scale).max(initial=0.0) / room)


def shown(kind, data):
    """An entry in a few words."""
    if kind == "text":
        return data.decode()[:120]
    found = store.numbers(kind, data)
    leading = ", ".join(f"{value:.17g}" for value in found[:3])
    return f"{kind.removeprefix('sha256 ')} [{leading}{', …' * (found.size > 3)}]"


def worst(base, new):
    """The first element that differs, and by how much."""
    first, second = store.numbers(*base), store.numbers(*new)
    if first is None or first.shape != second.shape:
        return ""
    with np.errstate(all="ignore"):
        differs = np.flatnonzero(~((first == second) | (np.isnan(first) & np.isnan(second))))
        if not differs.size:
            return "; samples are equal"
        relative = np.abs(first - second)[differs].max() / np.abs(first[np.isfinite(first)]).max(initial=0.0)
    k = differs[0]
    return f"; {differs.size} of {first.size}, [{k}] {first[k]:.17g} → {second[k]:.17g}, {relative:.1e} of the largest"


def compare_values(base, new, allow, count):
    """Print what differs by kind; the number of faults."""
    hosts = [{name: data for name, data in side.items() if name.startswith("host/")} for side in (base, new)]
    if hosts[0] != hosts[1]:
        print(
            "not comparable:",
            *({name: data.decode() for name, (_, data) in side.items()} for side in hosts),
            sep="\n  ",
        )
        sys.exit(2)
    groups, totals, faults = defaultdict(list), Counter(), 0
    for name in {**base, **new}:
        group = name.split("/", 1)[0], name.rsplit("/", 1)[1]
        totals[group] += 1
        if base.get(name) == new.get(name):
            continue
        if any(re.fullmatch(pattern, name) for pattern in allow):
            kind = "allowed by --allow"
        elif name not in new or name not in base:
            kind = "FAULT: missing" if name not in new else "FAULT: not in base"
        elif (found := allowed_class(name)) is None:
            kind = "FAULT"
        else:
            kind = (
                f"allowed: {found}" if apart(name, base[name], new[name]) <= 1 else f"FAULT: {found}, beyond rounding"
            )
        groups[(kind, *group)].append(name)
    for (kind, *group), names in sorted(groups.items()):
        faults += len(names) * kind.startswith("FAULT")
        found = {
            what: sorted({m[1] for name in names if (m := re.search(rf"\b{what}=(\d+)", name))}, key=int)
            for what in ("m", "n", "threads")
        }
        dtypes = sorted({dtype for name in names for dtype in EPS if f" {dtype}" in name})
        where = "; ".join([*(f"{what} {' '.join(found[what])}" for what in found), " ".join(dtypes)])
        print(f"{kind}: {'/'.join(group)}: {len(names)} of {totals[tuple(group)]} ({where})")
        for name in names[:count]:
            print(f"    {name}")
            if name in base and name in new:
                print(f"        {shown(*base[name])} → {shown(*new[name])}{worst(base[name], new[name])}")
    equal = len({**base, **new}) - sum(map(len, groups.values()))
    print(f"{equal} values equal, {sum(map(len, groups.values())) - faults} differ as allowed, {faults} faults")
    pairs = [(name, name.replace("threads=1", "threads=2")) for name in new if "threads=1" in name]
    threads = [name for name, other in pairs if new.get(other, new[name]) != new[name]]
    if threads:
        print(f"FAULT: {len(threads)} values depend on the number of threads, such as", *threads[:count], sep="\n    ")
    return faults + len(threads)


def compare_assembly(base, new, allow, count):
    """Print what differs by kind; the number of faults."""
    if base["host"] != new["host"]:
        print("not comparable:", base["host"], new["host"], sep="\n  ")
        sys.exit(2)
    groups, faults = defaultdict(list), 0
    known, given = ({found["text"] for found in side["code"].values()} for side in (base, new))
    for key in {**base["code"], **new["code"]}:
        first, second = base["code"].get(key), new["code"].get(key)
        if first is None or second is None:
            kind = "not in base" if first is None else "FAULT: missing"
            if first["text"] in given if second is None else second["text"] in known:
                kind = "renamed, and equal"
        elif first["text"] == second["text"]:
            kind = "equal"
        elif set(first["loops"]) == set(second["loops"]):
            more = first.get("others") != second.get("others")
            kind = "equal loops with multiply-adds, other code" + " and other loops" * more
            if key.startswith("cuda"):
                kind = "equal operations, in another order or other registers"
        elif key.startswith("cpu") and set(first["mixes"]) == set(second["mixes"]):
            kind = "OWED: the same vector operations in loops, in another order or other registers"
        else:
            kind = "OWED: other loops, or unrolled otherwise"
        if kind.startswith(("FAULT", "OWED")) and any(re.fullmatch(pattern, key) for pattern in allow):
            kind = re.sub("FAULT|OWED", "allowed by --allow", kind)
        groups[kind, key.split("/")[0]].append(key)
    for (kind, side), keys in sorted(groups.items()):
        faults += len(keys) * kind.startswith(("FAULT", "OWED"))
        print(f"{kind}: {side}: {len(keys)}")
        for key in keys[:count] if kind != "equal" else ():
            print(f"    {key}")
            if key in base["code"] and key in new["code"]:
                first, second = base["code"][key], new["code"][key]
                one, other = Counter(first["operations"]), Counter(second["operations"])
                print(f"        only in base {dict(one - other)}, only in new {dict(other - one)}")
                print(f"        {first['text']}.txt.gz {second['text']}.txt.gz")
    return faults


def main():
    """Compare two files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("new")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--show", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.base.endswith(".json"):
        sides = [json.loads(Path(path).read_text()) for path in (chosen.base, chosen.new)]
        faults = compare_assembly(*sides, chosen.allow, chosen.show)
    else:
        faults = compare_values(store.load(chosen.base), store.load(chosen.new), chosen.allow, chosen.show)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
