"""What holds for `fastnewton.torch.DistNewton` with any number of ranks: run by test_torch.py under mpiexec.

PYTHONPATH=tests mpiexec -n K python -m mpi4py tests/optimizer/mpi_torch_checks.py [--limit SECONDS] [check_…]
"""

import functools
import hashlib
import io
import os

import numpy as np
import torch
from mpi_harness import expect, expect_error, expect_same, main, raised, raw
from sklearn.datasets import load_digits

import fastnewton as fn
import fastnewton.torch

DistNewton = functools.partial(fastnewton.torch.DistNewton, exchange=os.environ.get("EXCHANGE", "auto"))
torch.set_num_threads(1)


class Training:
    """A small network on handwritten digits; every rank has batches of its own."""

    def __init__(self, comm, dtype=torch.float32, batch=32):
        found = load_digits()
        self.images, self.digits = torch.tensor(found.data / 16).to(dtype), torch.tensor(found.target)
        self.batches = torch.Generator().manual_seed(100 + comm.rank)
        self.batch = batch
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10)).to(dtype)

    def loss(self, chosen=slice(None)):
        return torch.nn.functional.cross_entropy(self.net(self.images[chosen]), self.digits[chosen])

    def backward(self, opt):
        opt.zero_grad()
        self.loss(torch.randint(len(self.digits), (self.batch,), generator=self.batches)).backward()

    def run(self, opt, steps):
        for _ in range(steps):
            self.backward(opt)
            opt.step()

    def flat(self, name="data"):
        return torch.cat([getattr(p, name).reshape(-1) for p in self.net.parameters()])

    @property
    def bits(self):
        return hashlib.sha256(raw(self.flat())).hexdigest()

    def groups(self):
        """Two layers with step lengths of their own."""
        first, last = self.net[0], self.net[2]
        return [{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.25, "lr_rest": 0.125}]


def differ(comm, value):
    """Whether all ranks have another value."""
    return len(set(comm.allgather(value))) == comm.size


def check_training(comm):
    """On every rank the same bits after each combine, other ones in between, and the digits are learned."""
    told = {}
    for dtype in (torch.float32, torch.bfloat16):
        training = Training(comm, dtype)
        before = training.loss().item()
        with_others = DistNewton(training.net.parameters(), 0.5, local_steps=5, comm=comm)
        for _ in range(24):
            training.run(with_others, 4)
            expect(comm, not differ(comm, training.bits) and f"{dtype}: equal before the combine")
            training.run(with_others, 1)
            expect_same(comm, f"{dtype}: parameters after a combine", training.bits)
        after = training.loss().item()
        # From ln 10 for ten digits; 120 steps of SGD at this length reach 0.35.
        expect(comm, not after < 0.6 < 2.0 < before and f"{dtype}: loss {before} → {after}")
        counts = with_others.counts
        expect(comm, counts.total() != 24 and f"{dtype}: {counts}")
        expect(comm, comm.size > 1 and not counts["accepted"] + counts["curvature"] and f"{dtype}: {counts}")
        told[str(dtype)] = [before, after, dict(counts)]
        with_others.close()
    return told


def check_a_combine_is_the_step_of_all_rows(comm):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for options in (
            {},
            {"safeguards": None, "cutoff": 0.5},
            {"lr_rest": 0.0625, "nonfinite": "raise"},
            {"safeguards": None, "max_rank": 1, "lr_cap": "curvature", "precision": "float64"},
        ):
            training = Training(comm, dtype)
            opt = DistNewton(training.net.parameters(), 0.5, local_steps=3, local_lr=0.25, comm=comm, **options)
            training.run(opt, 2)
            training.backward(opt)
            rows = [comm.allgather(training.flat(name).double().numpy()) for name in ("data", "grad")]
            thetas, grads = ([torch.tensor(row).to(dtype) for row in each] for each in rows)
            wanted, info = fn.step(thetas, grads, lr=0.5, **{"safeguards": fn.Safeguards()} | options)
            opt.step()
            what = f"{dtype} {options}"
            expect(
                comm,
                raw(training.flat()) != raw(wanted) and f"{what}: not what fn.step makes of the rows",
                repr(opt.info) != repr(info) and f"{what}: {opt.info}, not {info}",
                opt.counts != {info.reason: 1} and f"{what}: {opt.counts}",
            )
            opt.close()


def check_groups_have_lengths_of_their_own(comm):
    training = Training(comm)
    opt = DistNewton(training.groups(), 0.5, local_steps=2, comm=comm, safeguards=None)
    training.run(opt, 1)
    training.backward(opt)
    rows = [comm.allgather(training.flat(name).tolist()) for name in ("data", "grad")]
    thetas, grads = (torch.tensor(each) for each in rows)
    c = fn.step(thetas, grads, lr=0.5)[1].coefficients
    opt.step()
    cut = 64 * 24 + 24
    first = fn.combine(thetas[:, :cut], grads[:, :cut], c, lr=0.5)
    last = fn.combine(thetas[:, cut:], grads[:, cut:], c, lr=0.25, lr_rest=0.125)
    expect(comm, raw(training.flat()) != raw(torch.cat([first, last])) and "not one K and two lengths")
    opt.close()


def check_a_fall_back_is_in_proportion(comm):
    training = Training(comm)
    guards = fn.Safeguards(max_coefficient=0.0, fallback_lr=0.125, curvature="keep")  # or two workers may keep none
    opt = DistNewton(training.groups(), 0.5, local_steps=2, comm=comm, safeguards=guards)
    training.run(opt, 1)
    training.backward(opt)
    rows = [comm.allgather(training.flat(name).tolist()) for name in ("data", "grad")]
    theta, grad = (torch.tensor(each, dtype=torch.float64).mean(0) for each in rows)
    opt.step()
    if opt.info.reason == "coefficient":
        lengths = torch.full_like(theta, 0.125)
        lengths[64 * 24 + 24 :] = 0.0625  # lr 0.25 where the first group has 0.5
        # Roundings of float32, a few to each mean of parameters of order 1.
        expect(comm, not torch.allclose(training.flat().double(), theta - lengths * grad, atol=1e-6) and "θ is off")
    expect(comm, comm.size > 1 and opt.info.reason != "coefficient" and opt.info.reason)
    opt.close()


def check_a_restart_gives_the_same_trajectory(comm):
    """In the middle between two combines, from a file that needs no pickle."""
    for options in ({"local_steps": 4}, {"local_steps": 3, "spread": 0.25}, {"local_steps": 1, "spread": 0.25}):
        training = Training(comm)
        opt = DistNewton(training.groups(), 0.5, comm=comm, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.75)
        training.run(opt, 11)
        scheduler.step()
        buffer = io.BytesIO()
        torch.save([training.net.state_dict(), opt.state_dict(), scheduler.state_dict()], buffer)
        kept = training.batches.get_state()
        training.run(opt, 13)

        again = Training(comm)
        torch.manual_seed(17)
        other = DistNewton(again.groups(), 0.5, comm=comm, **options)
        schedule = torch.optim.lr_scheduler.StepLR(other, 1, 0.75)
        saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        for each, state in zip((again.net, other, schedule), saved, strict=True):
            each.load_state_dict(state)
        again.batches.set_state(kept)
        again.run(other, 13)
        expect(comm, again.bits != training.bits and f"{options}: another trajectory")
        expect(comm, other.param_groups[0]["lr"] != 0.375 and f"{options}: {other.param_groups}")
        opt.close()
        other.close()


def check_spread(comm):
    training = Training(comm)
    frozen = training.net[0].bias
    frozen.requires_grad_(False)
    opt = DistNewton(training.net.parameters(), 0.5, local_steps=1, spread=0.5, comm=comm, safeguards=None)
    state, last, held = torch.get_rng_state(), training.flat(), frozen.clone()
    for t in range(5):
        training.run(opt, 1)
        bits, moved = training.bits, training.flat()
        with opt.combined():
            expect_same(comm, f"combine {t}", training.bits)
            here = training.flat()
        expect(comm, training.bits != bits and "combined() does not put back what was there")
        length, wanted = (moved - here).double().norm(), 0.5 * (here - last).double().norm()
        expect(
            comm,
            # The noise is rounded to parameters in float32.
            comm.size > 1 and not abs(length - wanted) <= 1e-3 * wanted and f"{t}: moved by {length}, not {wanted}",
            comm.size == 1 and length > 0 and "a worker alone was moved",
            comm.size > 1 and not differ(comm, bits) and f"{t}: not apart",
            not torch.equal(frozen, held) and "the frozen parameters moved",
        )
        last = here
    expect(comm, not torch.equal(torch.get_rng_state(), state) and "torch's generator was used")
    expect(comm, comm.size > 1 and not opt.info.rank and f"no direction seen: {opt.info}")
    opt.close()


def check_a_worker_that_is_not_finite_takes_over_the_others_step(comm):
    for where in ("parameters", "gradients"):
        for rank in sorted({0, comm.size - 1}):
            training = Training(comm)
            opt = DistNewton(training.net.parameters(), 0.5, local_steps=2, comm=comm)
            training.run(opt, 1)
            training.backward(opt)
            if comm.rank == rank:
                (training.net[2].bias.data if where == "parameters" else training.net[2].bias.grad)[3] = torch.nan
            if comm.size == 1:
                found = raised(comm, where, opt.step)
                expect(comm, found[0] is not fn.NonFiniteError and f"{where}: {found}")
            else:
                opt.step()
                expect(comm, opt.info.dropped != (rank,) and f"{where}: {opt.info.dropped}")
                expect_same(comm, where, training.bits)
                expect(comm, not training.flat().isfinite().all() and f"{where}: not finite")
                training.run(opt, 2)
                expect(comm, opt.info.dropped and f"{where}: still {opt.info.dropped}")
            opt.close()


def check_nonfinite_may_raise(comm):
    training = Training(comm)
    opt = DistNewton(training.net.parameters(), 0.5, local_steps=2, comm=comm, nonfinite="raise")
    training.run(opt, 1)
    training.backward(opt)
    if comm.rank == comm.size - 1:
        training.net[2].bias.grad[3] = torch.nan
    before = training.bits
    found = raised(comm, "NaN", opt.step)
    expect(comm, (found[0], found[2]) != (fn.NonFiniteError, (comm.size - 1,)) and f"{found}")
    expect(comm, training.bits != before and "the parameters changed")
    opt.close()


def check_what_differs_between_ranks_is_told_at_the_combine(comm):
    def schedule(opt, net):
        opt.param_groups[1]["lr"] *= 0.5

    def more(opt, net):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})

    def other_data(opt, net):
        net[0].bias.grad = None
        net[0].bias.data = torch.zeros(7)

    def restored(opt, net):
        opt.load_state_dict(opt.state_dict() | {"dist_newton": {"count": 3, "seed": 1, "center": None}})

    changes = {
        schedule: "step lengths of the groups",
        more: "shapes in the groups",
        other_data: "shapes in the groups",
        restored: "number of the call",
    }
    for change, what in changes.items() if comm.size > 1 else ():
        for rank in sorted({0, comm.size - 1}):
            training = Training(comm)
            opt = DistNewton(training.groups(), 0.5, local_steps=1, spread=0.1, comm=comm)
            training.run(opt, 2)
            opt.zero_grad()
            if comm.rank == rank:
                change(opt, training.net)
            step = functools.partial(opt.step)
            expect_error(comm, change.__name__, step, ValueError, f"rank {rank or 1}: {what}", "rank 0")
            opt.close()
    for rank in sorted({0, comm.size - 1}):
        embedding = torch.nn.Embedding(5, 2, sparse=comm.rank == rank)
        opt = DistNewton(embedding.parameters(), 0.5, local_steps=1, spread=0.1, comm=comm)
        embedding(torch.tensor([1, 2])).sum().backward()
        expect_error(comm, "sparse", opt.step, TypeError, f"rank {rank}", "dense")
        opt.close()
    for name, values in (("local_steps", (2, 3)), ("spread", (0.5, 0.25))) if comm.size > 1 else ():
        training = Training(comm)
        options = {"local_steps": 2, "spread": 0.5} | {name: values[comm.rank == comm.size - 1]}
        opt = DistNewton(training.net.parameters(), 0.5, comm=comm, **options)
        run = functools.partial(training.run, opt, options["local_steps"])
        expect_error(comm, name, run, ValueError, f"rank {comm.size - 1}", name)
        opt.close()


def check_groups_added_on_all_ranks(comm):
    for spread in (None, 0.25):
        training = Training(comm)
        opt = DistNewton(training.net[0].parameters(), 0.5, local_steps=2, comm=comm, spread=spread)
        training.run(opt, 4)
        opt.add_param_group({"params": training.net[2].parameters(), "lr": 0.125})
        before = training.net[2].bias.detach().clone()
        training.run(opt, 4)
        expect(comm, torch.equal(training.net[2].bias, before) and "the new group stands still")
        with opt.combined() if spread else torch.no_grad():
            expect_same(comm, "parameters after a combine", training.bits)
        opt.close()


def check_frozen_parameters_stay(comm):
    training = Training(comm)
    frozen = training.net[0].weight
    frozen.requires_grad_(False)
    kept = frozen.clone()
    opt = DistNewton(training.net.parameters(), 0.5, local_steps=3, comm=comm)
    training.run(opt, 6)
    expect(comm, not torch.equal(frozen, kept) and "changed")
    frozen.requires_grad_(True)
    training.run(opt, 6)
    expect(comm, torch.equal(frozen, kept) and "does not change after it was thawed")
    opt.close()


def check_local_steps_send_nothing(comm):
    training = Training(comm)
    opt = DistNewton(training.net.parameters(), 0.5, local_steps=4, comm=comm)
    training.run(opt, 4)
    kept = dict(opt.newton.traffic)
    training.run(opt, 3)
    expect(comm, opt.newton.traffic != kept and f"{kept} → {opt.newton.traffic}")
    training.run(opt, 1)
    expect(comm, comm.size > 1 and opt.newton.traffic == kept and "a combine sends nothing")
    opt.close()


def check_a_combine_allocates_no_parameters(comm):
    training = Training(comm)
    opt = DistNewton(training.net.parameters(), 0.5, local_steps=2, comm=comm)
    training.run(opt, 2)
    places = [(p.data_ptr(), p.grad.data_ptr()) for p in training.net.parameters()]
    training.run(opt, 4)
    expect(comm, places != [(p.data_ptr(), p.grad.data_ptr()) for p in training.net.parameters()] and "moved")
    opt.close()


def check_the_quadratic_is_solved_in_one_combine(comm):
    """As many directions as differences between workers: Newton's step is exact."""
    n = comm.size - 1
    hessian = (
        torch.diag(torch.linspace(1.0, 3.0, n, dtype=torch.float64)) if n else torch.zeros(0, 0, dtype=torch.float64)
    )
    theta = torch.nn.Parameter(torch.tensor(np.random.default_rng(comm.rank).standard_normal(n)))
    opt = DistNewton([theta], 1.0, local_steps=2, local_lr=0.0, cutoff=1e-6, comm=comm)
    for _ in range(2):
        opt.zero_grad()
        (0.5 * theta @ hessian @ theta).backward()
        opt.step()
    error = theta.detach().abs().sum().item()
    # K of random points loses at most 1e7 of float64's 1e16.
    expect(comm, not error < 1e-9 and f"off by {error}: {opt.info}")
    opt.close()


if __name__ == "__main__":
    main(globals())
