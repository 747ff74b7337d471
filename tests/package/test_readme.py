"""The README's examples, run as they stand, print what it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastnewton as fn

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


NAMES = ["numpy", "torch", "jax", "training", "cupy", "optimizer", "allgather", "sharded", "server"]
NAMES += ["safeguards", "diagnostics"]


def test_readme_shows_every_library_the_optimizer_mpi_the_server_safeguards_and_diagnostics():
    libraries = [re.search(r"\b(torch|jax|cupy|mpi4py|numpy)\b", code)[0] for code, _ in EXAMPLES]
    assert libraries == ["numpy", "torch", "jax", "jax", "cupy", *["mpi4py"] * 4, "numpy", "numpy"]
    assert "fastnewton.torch" in EXAMPLES[NAMES.index("optimizer")][0]


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=NAMES)
def test_readme_example_prints_what_the_readme_says(code, output, tmp_path, capsys):
    if "import cupy" in code:
        assert _printed_on_a_simulated_device(code, capsys) == output
        return
    for library in ("torch", "jax", "mpi4py"):
        if f"import {library}" in code or f"from {library}" in code:
            pytest.importorskip(library)
    program = tmp_path / "workers.py"
    program.write_text(code, encoding="utf-8")
    command = [sys.executable, str(program)]
    if started := re.match(r"# mpiexec -n (\d)", code):
        found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
        if found is None:
            pytest.skip("no mpiexec")
        command = [found, "-n", started[1], sys.executable, "-m", "mpi4py", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.stdout == output, done.stderr


def _printed_on_a_simulated_device(code, capsys):
    from cudasim import build, checks

    if reason := build.why_unavailable():
        pytest.skip(reason)
    fn.step(*np.ones((2, 2, 2)), lr=1.0)  # Numba must not be loaded while sys.modules is patched, and then forgotten
    with checks.simulated_device():
        exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out
