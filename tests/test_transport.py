"""The solver against POT's float64 log solver, and against what must hold of any plan."""

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from otmix.transport import batched, sinkhorn
from otmix.types import Plan

EPSILONS = (0.1, 0.01, 0.005)


def eq_7(f: int, m: int, classes: int, seed: int, noise: float = 2.0) -> Tensor:
    """A cost as training makes them: features around class centres, and a confusion matrix with a few large entries."""
    g = torch.Generator().manual_seed(seed)
    y_f, y_b = torch.randint(classes, (f,), generator=g), torch.randint(classes, (m,), generator=g)
    confusion = torch.rand(classes, classes, generator=g) ** 4
    confusion = (confusion / confusion.sum(1, keepdim=True)).fill_diagonal_(0)
    centres = torch.randn(classes, 64, generator=g)
    z_f = F.normalize(torch.relu(centres[y_f] + noise * torch.randn(f, 64, generator=g)))
    z_b = F.normalize(torch.relu(centres[y_b] + noise * torch.randn(m, 64, generator=g)))
    return 0.05 * (1 - z_f @ z_b.T) + 0.95 * (1 - confusion[y_f][:, y_b])


def uniform(f: int, m: int, seed: int) -> Tensor:
    return torch.rand(f, m, generator=torch.Generator().manual_seed(seed))


COSTS = {
    "uniform": uniform(64, 64, 0),
    "10 classes": eq_7(128, 128, 10, 1),
    "100 classes": eq_7(128, 128, 100, 2),
    "more foregrounds": eq_7(90, 40, 10, 3),
    "more backgrounds": eq_7(40, 90, 10, 4),
    "constant": torch.full((20, 30), 0.7),
    "equal rows": uniform(1, 25, 5).expand(25, 25).contiguous(),
    "two equal halves": uniform(20, 20, 6).repeat(2, 1),
    "one class": eq_7(32, 32, 1, 7),
    "one foreground": uniform(1, 9, 8),
    "one background": uniform(9, 1, 9),
}


@cache
def reference(name: str, epsilon: float) -> Tensor:
    """POT's log solver in float64, converged."""
    cost = COSTS[name]
    f, m = cost.shape
    a, b = np.full(f, 1 / f), np.full(m, 1 / m)
    plan = ot.bregman.sinkhorn_log(a, b, cost.double().numpy(), epsilon, numItermax=50_000, stopThr=1e-9, warn=False)
    return torch.from_numpy(plan)


def eq_4(coupling: Tensor, cost: Tensor, epsilon: float) -> float:
    coupling = coupling.double()
    return float((coupling * cost.double()).sum() + epsilon * torch.xlogy(coupling, coupling).sum())


def divergence(coupling: Tensor, cost: Tensor, epsilon: float) -> float:
    """Eq. 4 plus the constant ε ln(f·m), as a divergence from the product of the masses: never a difference of nearly
    equal numbers, as eq. 4 can be, so that a relative gap means something.
    """
    return eq_4(coupling, cost, epsilon) + epsilon * math.log(coupling.numel())


def gap(objective: Callable[[Tensor, Tensor, float], float], *couplings: Tensor, cost: Tensor, epsilon: float) -> float:
    """How much larger it is for the first coupling than for the second, relative to that."""
    found, want = (objective(coupling, cost, epsilon) for coupling in couplings)
    return abs(found - want) / abs(want)


def on_other_devices(cost: Tensor, epsilon: float, max_iterations: int, tolerance: float = 1e-4) -> Plan:
    """The solver that runs all iterations in PyTorch; here on the CPU, as no other device is to be had in CI."""
    a, b = (torch.full((n,), 1 / n, dtype=cost.dtype) for n in cost.shape)
    return Plan(*batched.solve(cost, a, b, torch.tensor(True), epsilon, max_iterations, tolerance))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("solve", [sinkhorn, on_other_devices])
def test_agrees_with_pot(solve: Callable[..., Plan], name: str, epsilon: float, dtype: torch.dtype) -> None:
    cost = COSTS[name]
    plan = solve(cost.to(dtype), epsilon=epsilon, max_iterations=5000 if solve is sinkhorn else 1000)
    want = reference(name, epsilon)
    assert bool(plan.converged)
    chosen = want.gather(1, plan.coupling.argmax(1, keepdim=True))[:, 0]
    assert float((chosen >= 0.999 * want.amax(1)).double().mean()) >= 0.995
    assert gap(divergence, plan.coupling, want, cost=cost, epsilon=epsilon) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("solve", [sinkhorn, on_other_devices])
def test_the_objective_of_eq_4_as_it_is_written(
    solve: Callable[..., Plan], name: str, epsilon: float, dtype: torch.dtype
) -> None:
    """Of the uniform costs it is 0.0006, a difference of terms forty times as large: hence the tolerance, which float32
    does not reach on all of them.
    """
    cost = COSTS[name]
    plan = solve(cost.to(dtype), epsilon=epsilon, max_iterations=5000, tolerance=1e-6)
    assert bool(plan.converged) or (dtype == torch.float32 and float(plan.marginal_error) < 2e-5)
    assert gap(eq_4, plan.coupling, reference(name, epsilon), cost=cost, epsilon=epsilon) <= 1e-4


@given(
    f=st.integers(1, 9),
    m=st.integers(1, 9),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 50.0, 1e4]),
    epsilon=st.sampled_from([1e-3, 0.01, 0.5]),
    iterations=st.sampled_from([1, 7, 100]),
    wide=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_what_holds_of_every_plan(
    f: int, m: int, seed: int, scale: float, epsilon: float, iterations: int, wide: bool
) -> None:
    """Finite, non-negative, never all zero, honest about its error; without a warning."""
    cost = (uniform(f, m, seed) * scale).to(torch.float64 if wide else torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = sinkhorn(cost, epsilon=epsilon, max_iterations=iterations, tolerance=1e-4)
    coupling = plan.coupling
    assert coupling.dtype == cost.dtype
    assert bool(coupling.isfinite().all())
    assert bool((coupling >= 0).all())
    assert float(coupling.sum()) == pytest.approx(1, abs=1e-4)
    rows = float((coupling.double().sum(1) - 1 / f).abs().sum())
    columns = float((coupling.double().sum(0) - 1 / m).abs().sum())
    assert float(plan.marginal_error) == pytest.approx(max(rows, columns), abs=2e-6)
    assert bool(plan.converged) == (float(plan.marginal_error) <= 1e-4)
    assert 1 <= int(plan.iterations) <= iterations


@pytest.mark.parametrize("solve", [sinkhorn, on_other_devices])
def test_the_potentials_make_the_coupling(solve: Callable[..., Plan]) -> None:
    cost = COSTS["10 classes"].double()
    plan = solve(cost, epsilon=0.05, max_iterations=500)
    made = ((plan.foreground_potential[:, None] + plan.background_potential - cost) / 0.05).exp()
    torch.testing.assert_close(made, plan.coupling)


@pytest.mark.parametrize("solve", [sinkhorn, on_other_devices])
def test_the_error_is_that_of_the_worse_marginal(solve: Callable[..., Plan]) -> None:
    """After few iterations the rows are exact and the columns are not."""
    plan = solve(COSTS["more foregrounds"].double(), epsilon=0.005, max_iterations=8)
    rows, columns = (float((plan.coupling.sum(axis) - 1 / n).abs().sum()) for axis, n in ((1, 90), (0, 40)))
    assert rows < 1e-9 < 0.01 < columns
    assert float(plan.marginal_error) == pytest.approx(columns)


def test_masses_that_nearly_sum_to_one_are_divided_by_their_sum() -> None:
    cost, a, b = uniform(6, 8, 0).double(), torch.full((6,), 1 / 6).double(), torch.full((8,), 1 / 8).double()
    plan = sinkhorn(cost, 1.0008 * a, 0.9993 * b, epsilon=0.1, max_iterations=2000, tolerance=1e-9)
    assert bool(plan.converged)
    torch.testing.assert_close(plan.coupling.sum(1), a)
    torch.testing.assert_close(plan.coupling.sum(0), b)


def test_given_masses() -> None:
    cost = uniform(6, 8, 0).double()
    a, b = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]).double(), torch.full((8,), 1 / 8).double()
    plan = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=2000, tolerance=1e-9)
    torch.testing.assert_close(plan.coupling.sum(1), a)
    torch.testing.assert_close(plan.coupling.sum(0), b)
    want = ot.sinkhorn(a.numpy(), b.numpy(), cost.numpy(), 0.1, stopThr=1e-11, numItermax=20_000, warn=False)
    torch.testing.assert_close(plan.coupling, torch.from_numpy(want))


def test_a_foreground_without_mass_gets_nothing() -> None:
    plan = sinkhorn(uniform(3, 4, 0), torch.tensor([0.5, 0.0, 0.5]), epsilon=0.1)
    assert plan.coupling[1].tolist() == [0.0] * 4
    assert float(plan.coupling.sum()) == pytest.approx(1)


def test_a_batch_is_its_problems_one_by_one() -> None:
    costs = torch.stack([eq_7(12, 15, 3, seed) for seed in range(6)]).reshape(2, 3, 12, 15)
    together = sinkhorn(costs)
    assert together.coupling.shape == (2, 3, 12, 15)
    assert together.converged.shape == together.iterations.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(costs[i, j])
            torch.testing.assert_close(together.coupling[i, j], alone.coupling)
            assert int(together.iterations[i, j]) == int(alone.iterations)


@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_symmetries(seed: int) -> None:
    """Transposing, permuting, and adding constants to rows and columns do what they do to the exact solution."""
    cost = eq_7(10, 12, 3, seed).double()
    options = {"epsilon": 0.02, "max_iterations": 20_000, "tolerance": 1e-10}
    solved = sinkhorn(cost, **options)  # type: ignore[arg-type]
    assert bool(solved.converged)
    plan = solved.coupling
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(10, generator=g)
    shifted = cost + torch.rand(10, 1, generator=g).double() + torch.rand(12, generator=g).double()
    torch.testing.assert_close(sinkhorn(cost.T, **options).coupling.T, plan, atol=1e-9, rtol=1e-5)  # type: ignore[arg-type]
    torch.testing.assert_close(sinkhorn(cost[order], **options).coupling, plan[order], atol=1e-9, rtol=1e-5)  # type: ignore[arg-type]
    torch.testing.assert_close(sinkhorn(shifted, **options).coupling, plan, atol=1e-9, rtol=1e-5)  # type: ignore[arg-type]


def test_extrapolations_do_not_go_round_in_circles() -> None:
    """Small problems of few classes, for some of which extrapolation alone never ends."""
    for seed in range(60):
        cost = eq_7(10, 12, 3, seed).double()
        for problem in (cost, cost.T):
            assert bool(sinkhorn(problem, epsilon=0.02, max_iterations=50_000, tolerance=1e-10).converged), seed


def test_half_precision_costs_are_solved_in_float32() -> None:
    cost = COSTS["10 classes"]
    plan = sinkhorn(cost.bfloat16())
    assert plan.coupling.dtype == torch.float32
    torch.testing.assert_close(plan.coupling, sinkhorn(cost.bfloat16().float()).coupling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problems", [(), (2,), (0,), (2, 3)])
def test_all_numbers_have_the_type_of_the_cost(problems: tuple[int, ...], dtype: torch.dtype) -> None:
    plan = sinkhorn(uniform(4, 5, 0).to(dtype).expand(*problems, 4, 5))
    floats = (plan.coupling, plan.foreground_potential, plan.background_potential, plan.marginal_error)
    assert {x.dtype for x in floats} == {dtype}
    assert plan.converged.shape == plan.marginal_error.shape == problems


def test_no_gradient_is_kept() -> None:
    assert not sinkhorn(uniform(4, 4, 0).requires_grad_()).coupling.requires_grad


@pytest.mark.parametrize(
    ("cost", "options", "message"),
    [
        (torch.zeros(3), {}, r"\[\.\.\.,f,m\]"),
        (torch.zeros(0, 3), {}, r"\[\.\.\.,f,m\]"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, "floating"),
        (torch.zeros(2, 2), {"epsilon": 0.0}, "epsilon"),
        (torch.zeros(2, 2), {"epsilon": math.nan}, "epsilon"),
        (torch.zeros(2, 2), {"max_iterations": 0}, "max_iterations"),
        (torch.zeros(2, 2), {"tolerance": -1.0}, "tolerance"),
        (torch.tensor([[math.nan]]), {}, "finite"),
        (torch.zeros(2, 2), {"foreground_mass": torch.tensor([1.0])}, "foreground_mass"),
        (torch.zeros(2, 2), {"background_mass": torch.tensor([1.5, -0.5])}, "background_mass"),
    ],
)
def test_bad_arguments_are_named(cost: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn(cost, **options)  # type: ignore[arg-type]


def test_the_kernel_for_cuda_finds_the_same_plans() -> None:
    """Triton's interpreter runs it on the CPU; it must be asked for before the kernel is made."""
    pytest.importorskip("triton")
    program = [sys.executable, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "agree"


def kernel_agrees() -> None:
    """What the test above runs."""
    from otmix.transport import fused

    for name, epsilon in (("10 classes", 0.01), ("more foregrounds", 0.005), ("one class", 0.01), ("constant", 0.1)):
        cost = COSTS[name]
        f, m = cost.shape
        a, b = torch.full((f,), 1 / f), torch.full((m,), 1 / m)
        found = Plan(*fused.solve(cost, a, b, torch.tensor(True), epsilon, 300, 1e-4))
        want = sinkhorn(cost, epsilon=epsilon, max_iterations=300)
        assert bool(found.converged), name
        assert abs(int(found.iterations) - int(want.iterations)) <= 24
        torch.testing.assert_close(found.coupling, want.coupling, rtol=2e-2, atol=1e-6)
        assert_same_potentials(found, want)
    # several problems, empty masses, iterations that end within a block
    cost = torch.stack([eq_7(20, 17, 5, 1), eq_7(20, 17, 5, 2)])
    a = torch.tensor([0.0, *[1 / 19] * 19]).expand(2, 20)
    b = torch.tensor([*[1 / 15] * 15, 0.0, 0.0]).expand(2, 17)
    found = Plan(*fused.solve(cost, a, b, torch.tensor([True, False]), 0.05, 8, 1e-7))
    want = sinkhorn(cost, a, b, epsilon=0.05, max_iterations=8, tolerance=1e-7)
    assert found.iterations.tolist() == want.iterations.tolist() == [8, 8]
    assert found.converged.tolist() == [False, False]
    assert math.isinf(float(found.marginal_error[1]))
    torch.testing.assert_close(found.coupling, want.coupling, rtol=1e-3, atol=1e-7)
    assert_same_potentials(found, want)
    # a kernel that underflows without absorbed potentials, and masses of very different size
    cost = 40 * uniform(33, 20, 7)
    a = torch.arange(1.0, 34.0) ** 3
    a /= a.sum()
    b = torch.full((20,), 1 / 20)
    found = Plan(*fused.solve(cost, a, b, torch.tensor(True), 0.1, 600, 1e-4))
    want = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=600)
    assert bool(found.converged) == bool(want.converged)
    torch.testing.assert_close(found.coupling, want.coupling, rtol=5e-2, atol=1e-5)


def assert_same_potentials(found: Plan, want: Plan) -> None:
    """Up to a constant that one gains and the other loses; −∞ at the same places."""
    pairs = (
        (found.foreground_potential, want.foreground_potential),
        (found.background_potential, want.background_potential),
    )
    means = []
    for x, y in pairs:
        assert torch.equal(x.isinf(), y.isinf())
        change = torch.where(x.isinf(), 0.0, x - y)
        mean = change.sum(-1) / x.isfinite().sum(-1)
        assert float(torch.where(x.isinf(), 0.0, change - mean[..., None]).abs().max()) < 2e-4
        means.append(mean)
    assert float((means[0] + means[1]).abs().max()) < 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("name", COSTS)
def test_cuda_finds_the_plan_of_the_cpu(name: str, epsilon: float) -> None:
    cost = COSTS[name]
    want, found = (sinkhorn(c, epsilon=epsilon, max_iterations=900) for c in (cost, cost.cuda()))
    assert bool(found.converged)
    torch.testing.assert_close(found.coupling.cpu(), want.coupling, rtol=5e-2, atol=2e-6)
    several = sinkhorn(torch.stack([cost, cost.flip(0)]).cuda(), epsilon=epsilon, max_iterations=900)
    torch.testing.assert_close(several.coupling[1].flip(0).cpu(), want.coupling, rtol=5e-2, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [100, 256, 300])
def test_cuda_does_not_wait_whatever_the_size(side: int) -> None:
    cost = eq_7(side, side, 10, 0).cuda()
    sinkhorn(cost)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = sinkhorn(cost, max_iterations=600)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(plan.converged)
    assert_same_potentials(
        Plan(*(part.cpu() for part in vars(plan).values())), sinkhorn(cost.cpu(), max_iterations=600)
    )


@pytest.mark.gpu
def test_cuda_can_be_captured() -> None:
    cost = COSTS["10 classes"].cuda()
    plan = sinkhorn(cost)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sinkhorn(cost)
    graph.replay()
    torch.testing.assert_close(captured.coupling, plan.coupling)


@pytest.mark.parametrize("name", COSTS)
def test_the_solver_of_other_devices_finds_the_same_plans(name: str) -> None:
    cost = COSTS[name]
    f, m = cost.shape
    both = torch.stack([cost, cost.flip(0)]).double()
    a, b = torch.full((2, f), 1 / f).double(), torch.full((2, m), 1 / m).double()
    valid = torch.tensor([True, True])
    coupling, _, _, iterations, error, converged = batched.solve(both, a, b, valid, 0.01, 900, 1e-7)
    assert bool(converged.all())
    assert float(error.max()) <= 1e-7
    assert int(iterations.max()) <= 900
    want = sinkhorn(cost.double(), max_iterations=900, tolerance=1e-7).coupling
    torch.testing.assert_close(coupling[0], want, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(coupling[1], want.flip(0), rtol=1e-4, atol=1e-8)


def test_the_solver_of_other_devices_marks_what_is_not_finite() -> None:
    cost = uniform(5, 6, 0).repeat(2, 1, 1)
    a, b = torch.full((2, 5), 1 / 5), torch.full((2, 6), 1 / 6)
    coupling, _, _, _, error, converged = batched.solve(cost, a, b, torch.tensor([True, False]), 0.1, 200, 1e-4)
    assert converged.tolist() == [True, False]
    assert error[1] == math.inf
    assert bool(coupling.isfinite().all())


def test_favourites_are_the_largest_entries() -> None:
    plan = sinkhorn(torch.stack([COSTS["10 classes"], COSTS["100 classes"]]))
    assert torch.equal(plan.favourites, plan.coupling.argmax(-1))


if __name__ == "__main__":  # by test_the_kernel_for_cuda_finds_the_same_plans
    kernel_agrees()
    print("agree")


def test_arrays_and_lists_are_taken_as_tensors() -> None:
    cost, mass = uniform(3, 4, 0), torch.tensor([0.2, 0.3, 0.5])
    want = sinkhorn(cost, mass).coupling
    assert torch.equal(sinkhorn(cost.numpy(), mass.numpy()).coupling, want)  # type: ignore[arg-type]
    assert torch.equal(sinkhorn(cost.tolist(), mass.tolist()).coupling, want)  # type: ignore[arg-type]
