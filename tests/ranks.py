"""Start checks that several ranks run together, and read what they found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
LIMIT = 240  # seconds for one run, kernels compiled on every rank included; warm, it takes a few

# Numbers of threads, and what launchers leave behind: the ranks are to see their own launcher alone.
UNWANTED = ("FASTNEWTON_NUM_THREADS", "NUMBA_NUM_THREADS", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "SLURM_NTASKS")


class Ranks:
    """One run of the checks under mpiexec."""

    def __init__(self, size, *checks, program, python=sys.executable, mpiexec=(MPIEXEC,), **variables):
        if None in mpiexec:
            pytest.skip("no mpiexec")
        command = [python, "-W", "error", "-m", "mpi4py", str(program), "--limit", str(LIMIT - 20)]
        environment = {name: value for name, value in os.environ.items() if name not in UNWANTED} | variables
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        started = subprocess.Popen(
            [*mpiexec, "-n", str(size), *command, *checks],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            self.output, _ = started.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            started.terminate()  # mpiexec then ends its ranks
            self.output = f"no end after {LIMIT} s\n{started.communicate(timeout=20)[0]}"
        self.status = started.returncode
        lines = [line for line in self.output.splitlines() if line.startswith('{"check"')]
        self.outcomes = {outcome["check"]: outcome for outcome in map(json.loads, lines)}

    def told(self, check):
        """What a check returned on rank 0; fails with what each rank has to say."""
        assert check in self.outcomes, f"no word of {check}: it hangs, or a rank has ended.\n{self.output}"
        outcome = self.outcomes[check]
        ranks = {}
        for rank, text in outcome["failed"].items():
            ranks.setdefault(text, []).append(rank)
        assert not ranks, "\n".join(f"on rank {', '.join(those)}:\n{text}" for text, those in ranks.items())
        if outcome["skipped"]:
            pytest.skip(outcome["skipped"])
        return outcome["told"]
