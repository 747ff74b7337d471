"""`fastnewton.torch.DistNewton`: one process here, and with 4 ranks what stands in mpi_torch_checks.py."""

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

import fastnewton as fn

pytest.importorskip("torch")

import torch

from fastnewton.torch import DistNewton

PROGRAM = Path(__file__).with_name("mpi_torch_checks.py")
CHECKS = re.findall(r"^def (check_\w+)", PROGRAM.read_text(encoding="utf-8"), re.MULTILINE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def net():
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def gradients(net, seed, scale=1.0):
    """Gradients from random inputs, added to what is there, as backward does."""
    like = next(net.parameters())
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).to(like.dtype)
    (scale * net(x).square().sum()).backward()


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def trajectory(net, opt, steps=6, zero=None):
    for t in range(steps):
        (zero or opt.zero_grad)()
        gradients(net, t)
        opt.step()
    return flat(net)


def twin(net):
    """The same parameters in another module."""
    other = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    other.load_state_dict(net.state_dict())
    return other.to(next(net.parameters()).dtype)


# -- what a worker alone does -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_worker_alone_does_sgd(net, dtype):
    net.to(dtype)
    other = twin(net)
    wanted = trajectory(other, torch.optim.SGD(other.parameters(), 0.01))
    found = trajectory(net, DistNewton(net.parameters(), 0.01, local_steps=2))
    assert found.dtype == dtype
    # The same operations; torch's vector and scalar code may round differently, once for each of 6 steps.
    assert torch.allclose(found.double(), wanted.double(), rtol=6 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_each_group_has_its_lengths_at_the_right_calls():
    p, q = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 3))
    opt = DistNewton(
        [{"params": [p], "lr": 1.0, "local_lr": 10.0}, {"params": [q], "lr_rest": 100.0}], 2.0, local_steps=3
    )
    moved = []
    for _ in range(3):
        opt.zero_grad()
        (p.sum() + q.sum()).backward()
        before = p[0].item(), q[0].item()
        opt.step()
        moved.append((before[0] - p[0].item(), before[1] - q[0].item()))
    assert moved == [(10.0, 2.0), (10.0, 2.0), (1.0, 100.0)]


def test_a_worker_alone_is_not_moved_apart(net):
    other = twin(net)
    found = trajectory(net, DistNewton(net.parameters(), 0.01, local_steps=1, spread=0.5))
    wanted = trajectory(other, DistNewton(other.parameters(), 0.01, local_steps=2))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("schedule", ["StepLR", "CosineAnnealingLR", "OneCycleLR"])
def test_schedulers_set_the_length_of_the_next_step(schedule):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = DistNewton([p], 1.0, local_steps=2)
    settings = {
        "StepLR": {"step_size": 2, "gamma": 0.5},
        "CosineAnnealingLR": {"T_max": 4},
        "OneCycleLR": {"max_lr": 2.0, "total_steps": 9, "cycle_momentum": False},
    }[schedule]
    scheduler = getattr(torch.optim.lr_scheduler, schedule)(opt, **settings)
    wanted, moved = [], []
    for _ in range(4):
        opt.zero_grad()
        p.sum().backward()
        before = p.item()
        wanted.append(scheduler.get_last_lr()[0])
        opt.step()
        moved.append(before - p.item())
        scheduler.step()
    assert len(set(wanted)) > 1
    assert moved == pytest.approx(wanted, rel=1e-12)  # differences of numbers of order 1


def test_the_closure_is_evaluated_with_gradients_and_its_result_returned(net):
    other = twin(net)
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)

    def closure():
        opt.zero_grad()
        gradients(net, len(calls))
        calls.append(torch.is_grad_enabled())
        return "the loss"

    calls = []
    assert [opt.step(closure) for _ in range(6)] == ["the loss"] * 6
    assert all(calls)
    assert torch.equal(flat(net), trajectory(other, DistNewton(other.parameters(), 0.01, local_steps=2)))


def test_a_graph_from_before_the_step_is_noticed(net):
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)
    loss = net(torch.ones(1, 5)).square().sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- buffers ------------------------------------------------------------------------------------------------


def test_parameters_and_gradients_are_views_and_stay(net):
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)
    trajectory(net, opt, 1)
    seen = [(p.data_ptr(), p.grad, p.grad.data_ptr()) for p in net.parameters()]
    trajectory(net, opt)
    assert [(p.data_ptr(), p.grad.data_ptr()) for p in net.parameters()] == [(each[0], each[2]) for each in seen]
    assert all(p.grad is each[1] for p, each in zip(net.parameters(), seen, strict=True))
    for tensors in (list(net.parameters()), [p.grad for p in net.parameters()]):
        assert len({each.untyped_storage().data_ptr() for each in tensors}) == 1
        places = [each.storage_offset() for each in tensors]
        assert places == np.cumsum([0, *(each.numel() for each in tensors)])[:-1].tolist()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_zeroes_in_place(net, set_to_none):
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)
    gradients(net, 0)
    opt.step()
    kept = [p.grad for p in net.parameters()]
    assert any(grad.any() for grad in kept)
    opt.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is grad and not grad.any() for p, grad in zip(net.parameters(), kept, strict=True))


def _replaced(net):
    for p in net.parameters():
        p.grad = torch.zeros_like(p)


def _parameters_replaced(net):
    net.zero_grad()
    for p in net.parameters():
        p.data = p.data.clone()


@pytest.mark.parametrize("zero", [torch.nn.Module.zero_grad, _replaced, _parameters_replaced])
def test_what_was_replaced_is_taken_over(net, zero):
    other = twin(net)
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)
    found = trajectory(net, opt, zero=lambda: zero(net))
    assert torch.equal(found, trajectory(other, DistNewton(other.parameters(), 0.01, local_steps=2)))
    opt.zero_grad()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_a_missing_gradient_is_zero_and_an_old_one_is_forgotten(net):
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)
    trajectory(net, opt, 1)
    before = flat(net)
    net.zero_grad()
    opt.step()
    opt.step()
    assert torch.equal(flat(net), before)


def test_gradients_accumulate(net):
    other = twin(net)
    opt, reference = DistNewton(net.parameters(), 0.01, local_steps=2), torch.optim.SGD(other.parameters(), 0.01)
    for each in (net, other):
        gradients(each, 0)
        gradients(each, 1)
    opt.step()
    reference.step()
    assert torch.allclose(flat(net), flat(other), rtol=1e-6, atol=1e-7)  # a rounding of float32


def test_frozen_parameters_stay_and_may_be_thawed(net):
    frozen = net[0].weight
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)
    trajectory(net, opt)
    assert torch.equal(frozen, kept)
    assert frozen.grad is None
    frozen.requires_grad_(True)
    trajectory(net, opt)
    assert not torch.equal(frozen, kept)
    kept = frozen.detach().clone()
    frozen.requires_grad_(False)
    trajectory(net, opt)
    assert torch.equal(frozen, kept)


def test_a_group_may_be_added_later(net):
    other = twin(net)
    opt = DistNewton(net[0].parameters(), 0.01, local_steps=2)
    trajectory(net, opt, 2)
    opt.add_param_group({"params": net[2].parameters(), "lr": 0.02})
    found = trajectory(net, opt)
    reference = torch.optim.SGD(other[0].parameters(), 0.01)
    for t in range(2):
        reference.zero_grad()
        gradients(other, t)
        reference.step()
    reference.add_param_group({"params": other[2].parameters(), "lr": 0.02})
    assert torch.allclose(found, trajectory(other, reference), rtol=1e-5, atol=1e-6)  # roundings of 8 steps of float32


def test_a_module_may_change_its_dtype(net):
    other = twin(net).double()
    opt = DistNewton(net.parameters(), 0.01, local_steps=2)
    opt.zero_grad()
    net.double()
    wanted = trajectory(other, DistNewton(other.parameters(), 0.01, local_steps=2))
    assert torch.equal(trajectory(net, opt), wanted)


def test_parameters_of_odd_shapes():
    shapes = [(), (0,), (3, 0, 2), (1,), (2, 3)]
    params = [torch.nn.Parameter(torch.full(shape, 2.0)) for shape in shapes]
    params.append(torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()))
    opt = DistNewton(params, 0.5, local_steps=2)
    opt.zero_grad()
    sum(p.square().sum() for p in params).backward()
    opt.step()
    assert [p.shape for p in params] == [*map(torch.Size, shapes), (3, 2)]
    assert not any(p.any() for p in params)  # θ − ½·2θ


# -- what is not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["drop", "raise"])
@pytest.mark.parametrize("where", ["parameters", "gradients"])
def test_a_worker_alone_that_is_not_finite_is_an_error(net, nonfinite, where):
    opt = DistNewton(net.parameters(), 0.01, local_steps=2, nonfinite=nonfinite)
    trajectory(net, opt, 1)
    opt.zero_grad()
    (net[0].bias.data if where == "parameters" else net[0].bias.grad)[1] = torch.nan
    before = flat(net)
    with pytest.raises(fn.NonFiniteError) as caught:
        opt.step()
    assert caught.value.workers == (0,)
    assert torch.equal(flat(net).nan_to_num(), before.nan_to_num())


def test_nan_may_propagate(net):
    opt = DistNewton(net.parameters(), 0.01, local_steps=2, nonfinite="propagate")
    trajectory(net, opt, 1)
    opt.zero_grad()
    net[0].bias.grad[1] = torch.nan
    opt.step()
    assert flat(net).isnan().sum() == 1


# -- checkpoints --------------------------------------------------------------------------------------------


def test_a_restart_goes_on_where_it_was(net):
    opt = DistNewton(net.parameters(), 0.01, lr_rest=0.03, local_steps=3)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.9)
    trajectory(net, opt, 4)
    scheduler.step()
    buffer = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}, buffer)
    other = twin(net)
    again = DistNewton(other.parameters(), 1.0, local_steps=3)
    schedule = torch.optim.lr_scheduler.StepLR(again, 1, 0.9)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    again.load_state_dict(saved["opt"])
    schedule.load_state_dict(saved["scheduler"])
    other.load_state_dict(saved["net"])
    for _ in range(2):
        assert torch.equal(trajectory(net, opt), trajectory(other, again))
        scheduler.step()
        schedule.step()


def test_the_state_of_another_optimizer_is_refused(net):
    opt = DistNewton(net.parameters(), 0.01, local_steps=3)
    with pytest.raises(ValueError, match="state_dict must be that of a DistNewton"):
        opt.load_state_dict(torch.optim.SGD(net.parameters(), 0.01).state_dict())


def test_pickle_is_told_of_state_dict(net):
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(DistNewton(net.parameters(), 0.01, local_steps=3))


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"local_steps": 1}, ValueError, "local_steps must be at least 2, or 1 with a positive spread"),
        ({"local_steps": 1, "spread": 0.0}, ValueError, "local_steps.*spread"),
        ({"local_steps": 0, "spread": 1.0}, ValueError, "local_steps"),
        ({"local_steps": None}, ValueError, "local_steps"),
        ({"local_steps": 2.0}, TypeError, "local_steps"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": None}, TypeError, "lr"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr"),
        ({"lr_rest": np.nan}, ValueError, "lr_rest"),
        ({"local_lr": "much"}, TypeError, "local_lr"),
        ({"spread": -0.1}, ValueError, "spread"),
        ({"cutoff": 1.0}, ValueError, "cutoff"),
        ({"max_rank": -1}, ValueError, "max_rank"),
        ({"lr_cap": "tau"}, ValueError, "lr_cap"),
        ({"precision": "float32"}, ValueError, "precision"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite"),
        ({"safeguards": True}, TypeError, "safeguards"),
        ({"comm": "world"}, TypeError, "comm"),
        ({"exchange": "ring"}, ValueError, "exchange"),
        ({"params": []}, ValueError, "empty parameter list"),
    ],
)
def test_bad_arguments(net, arguments, error, words):
    if "comm" in arguments:
        pytest.importorskip("mpi4py", exc_type=ImportError)
    given = {"params": net.parameters(), "lr": 0.1, "local_steps": 2} | arguments
    with pytest.raises(error, match=words):
        DistNewton(**given)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.zeros(2, dtype=torch.float64), "one dtype.*float32.*float64"),
        (torch.zeros(2, dtype=torch.complex64), "float16, bfloat16, float32 or float64.*complex64"),
        (torch.zeros(2, device="meta"), "one device.*meta"),
    ],
)
def test_mixed_parameters_are_refused_and_a_refused_group_is_not_added(net, other, words):
    with pytest.raises(TypeError, match=words):
        DistNewton([*net.parameters(), torch.nn.Parameter(other)], 0.1, local_steps=2)
    opt = DistNewton(net.parameters(), 0.1, local_steps=2)
    with pytest.raises(TypeError, match=words):
        opt.add_param_group({"params": [torch.nn.Parameter(other)]})
    with pytest.raises(ValueError, match="lr"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": -1.0})
    assert len(opt.param_groups) == 1
    trajectory(net, opt)


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    opt = DistNewton(embedding.parameters(), 0.1, local_steps=2)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"dense.*sparse"):
        opt.step()


def test_a_scheduler_that_goes_below_zero_is_noticed(net):
    opt = DistNewton(net.parameters(), 0.1, local_steps=2)
    opt.param_groups[0]["lr"] = -0.1
    with pytest.raises(ValueError, match=r"at least 0; got -0\.1"):
        trajectory(net, opt)


def test_without_spread_there_is_nothing_to_look_at(net):
    opt = DistNewton(net.parameters(), 0.1, local_steps=2)
    with pytest.raises(ValueError, match="spread"), opt.combined():
        pass


def test_without_torch_the_error_names_the_extra(run_python, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    program = "import fastnewton\ntry:\n    import fastnewton.torch\nexcept ImportError as error:\n    print(error)"
    assert "fastnewton[train]" in run_python("-c", program, env={"PYTHONPATH": str(tmp_path)})


# -- with others --------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((size, exchange), marks=() if (size, exchange) == (4, "sharded") else pytest.mark.full)
        for size in (1, 2, 3, 4, 8)
        for exchange in ("sharded", "allgather")
    ],
    ids=lambda param: f"{param[0]}-ranks-{param[1]}",
)
def ranks(request):
    from ranks import Ranks

    size, exchange = request.param
    return Ranks(size, program=PROGRAM, EXCHANGE=exchange)


@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(ranks, check):
    ranks.told(check)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cuda_device(net, dtype):
    mpi = pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    net = net.to("cuda", dtype)
    kept = flat(net)
    opt = DistNewton(net.parameters(), 0.01, local_steps=2, comm=mpi.COMM_SELF)
    for _ in range(4):
        opt.zero_grad()
        net(torch.ones(7, 5, device="cuda", dtype=dtype)).square().sum().backward()
        opt.step()
    assert flat(net).isfinite().all()
    assert not torch.equal(flat(net), kept)
    assert opt.info.rank == 0
