"""MPI ranks of `python -m bench figure1`, started by `figure1.py`: the workers of the paper's experiment.

The paper does not say how workers come apart.  A protocol is one way: from the common θ, a worker's θ_k and the row
that it hands to the step.  A step needs centred rows as G and their mean as ḡ: where these come from different
gradients, h_k for G and g_k for ḡ, the row is h_k + mean(g − h).

    own              p − 1 local steps, each on an own fresh share of a batch; then the gradient of another share
    probe            as own; but G from gradients of one small batch that all workers share: p + 1 gradients
    diff             as own, ending on the first share again; G from g(θ_k) − g(θ) of that share
    spread-step      θ_k = θ + random, as long as the last step; then the gradient of an own share: 1 gradient
    spread-gradient  the same, a tenth of the norm of the worker's last gradient long
    sgd              no step apart; with momentum the row is the velocity
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from bench import problems
from bench.convnet import ConvNet, images
from bench.figure1 import BATCH, LOCAL_STEPS, Run
from fastnewton import NonFiniteError
from fastnewton.mpi import DistNewton

SPREAD = {"step": 1.0, "gradient": 0.1}
DIVERGED = 50.0  # a negative log-likelihood beyond this is not followed further

Row = tuple[torch.Tensor, torch.Tensor]


class Worker:
    """One worker: its share of every batch, and what it has seen."""

    def __init__(self, comm: MPI.Intracomm, net: ConvNet, run: Run):
        self.comm, self.net, self.run = comm, net, run
        self.evaluations = 0
        self.lengths = {"step": 0.0, "gradient": 0.0}  # of the last step, and of this worker's last gradient
        self.velocity = torch.zeros_like(net.start)
        self.rng = np.random.default_rng([run.seed, comm.rank])
        self._shared_rng, self._order = np.random.default_rng(run.seed), np.empty(0, np.int64)

    def draw(self, count: int) -> np.ndarray:
        """So many images, the same on all workers; each once before the first comes again."""
        if self._order.size < count:
            self._order = self._shared_rng.permutation(self.run.samples)
        drawn, self._order = np.split(self._order, [count])
        return drawn

    def share(self) -> np.ndarray:
        """This worker's part of a batch."""
        return self.draw(BATCH)[self.comm.rank :: self.comm.size]

    def gradient(self, theta: torch.Tensor, chosen: np.ndarray) -> torch.Tensor:
        self.evaluations += 1
        gradient = self.net.gradient(theta, chosen)
        self.lengths["gradient"] = float(gradient.norm())
        return gradient

    def local_steps(self, theta: torch.Tensor, count: int) -> torch.Tensor:
        """So many steps of SGD by itself, each on a fresh share."""
        for _ in range(count):
            theta = theta - self.run.lr * self.gradient(theta, self.share())
        return theta

    def mean(self, vector: torch.Tensor) -> torch.Tensor:
        """Over all workers."""
        total = np.empty_like(vector.numpy())
        self.comm.Allreduce(vector.numpy(), total)
        return torch.from_numpy(total / self.comm.size)

    def loss(self, theta: torch.Tensor) -> float:
        """Mean negative log-likelihood over all images, each worker's part of them added up."""
        first, last = (k * self.run.samples // self.comm.size for k in (self.comm.rank, self.comm.rank + 1))
        return self.comm.allreduce(self.net.total_loss(theta, first, last)) / self.run.samples


def sgd(worker: Worker, theta: torch.Tensor) -> Row:
    worker.velocity = worker.run.momentum * worker.velocity + worker.gradient(theta, worker.share())
    return theta, worker.velocity


def own(worker: Worker, theta: torch.Tensor) -> Row:
    theta = worker.local_steps(theta, LOCAL_STEPS - 1)
    return theta, worker.gradient(theta, worker.share())


def probe(worker: Worker, theta: torch.Tensor) -> Row:
    theta, gradient = own(worker, theta)
    secant = worker.gradient(theta, worker.draw(BATCH // worker.comm.size))
    return theta, secant + worker.mean(gradient - secant)


def diff(worker: Worker, theta: torch.Tensor) -> Row:
    share = worker.share()
    before = worker.gradient(theta, share)
    theta = worker.local_steps(theta - worker.run.lr * before, LOCAL_STEPS - 2)
    secant = worker.gradient(theta, share) - before
    return theta, secant + worker.mean(before)


def spread(worker: Worker, theta: torch.Tensor, of: str) -> Row:
    apart = problems.spread(worker.rng, theta.numpy(), SPREAD[of] * worker.lengths[of])[0]
    theta = torch.from_numpy(apart.astype(np.float32))
    return theta, worker.gradient(theta, worker.share())


PROTOCOLS: dict[str, Callable[[Worker, torch.Tensor], Row]] = {
    **{protocol.__name__: protocol for protocol in (sgd, own, probe, diff)},
    **{f"spread-{of}": partial(spread, of=of) for of in SPREAD},
}


def train(comm: MPI.Intracomm, net: ConvNet, run: Run) -> dict:
    """The loss after each epoch, against gradients evaluated by each worker; and means over all steps."""
    worker, theta = Worker(comm, net, run), net.start
    history, infos = [(0, worker.loss(theta))], []
    with DistNewton(comm, **run.options) as newton:
        while worker.evaluations < run.evaluations and history[-1][1] < DIVERGED:
            try:
                new, info = newton.step(*PROTOCOLS[run.protocol](worker, theta))
            except NonFiniteError:
                history.append((worker.evaluations, float("nan")))
                continue
            worker.lengths["step"], theta = float((new - theta).norm()), new
            infos.append((info.rank, info.captured, info.lr < run.options["lr"]))
            if worker.evaluations >= len(history) * run.evaluations / run.epochs:
                history.append((worker.evaluations, worker.loss(theta)))
    means = np.mean(infos, axis=0).tolist() if infos else [0.0] * 3
    return {
        "evaluations": [evaluations for evaluations, _ in history],
        "nll": [nll if np.isfinite(nll) else None for _, nll in history],
        **dict(zip(("rank", "captured", "capped"), means, strict=True)),
    }


def main(settings: dict) -> None:
    torch.set_num_threads(1)
    os.environ["FASTNEWTON_NUM_THREADS"] = "1"
    runs = [Run(**fields) for fields in settings["runs"]]
    world, workers, folder = MPI.COMM_WORLD, runs[0].workers, Path(settings["folder"])
    group, groups = world.rank // workers, world.size // workers
    comm, load = MPI.Intracomm(world.Split(group)), cache(images)
    for run in runs[group::groups]:
        started = time.perf_counter()
        net = ConvNet(run.data, run.activation, *load(run.data, settings["data"], run.samples), run.seed)
        found = {"run": asdict(run), "command": settings["command"], **train(comm, net, run)}
        found["seconds"] = time.perf_counter() - started
        if comm.rank == 0:
            part = folder / f"{run.name}.part"  # renamed when whole: what is there can be relied on
            part.write_text(json.dumps(found))
            part.replace(folder / f"{run.name}.json")
            print("done", flush=True)
    if world.rank == 0:
        Path(settings["result"]).write_text("null")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
