"""RIDE's loss: against plain loops in float64, reduced to its base, mixed, and what it does to experts."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from otmix.errors import UserError
from otmix.losses import LDAM, LOSSES, RIDE, ClassBalancedSigmoid, Criterion, CrossEntropy, Reduction
from otmix.losses.ride import class_temperature, expert_divergence
from otmix.types import ClassCounts, Output, Target

COUNTS = ClassCounts(torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]))

# The formulas of the fact sheet in Python's float64.


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - total for z in logits]


def slow_temperature(n: list[int], rho: float) -> list[float]:
    raw = [len(n) * count / sum(n) * rho + 1 - rho for count in n]
    return [t / max(raw) for t in raw]


def slow_divergence(experts: list[list[list[float]]], temperature: list[float]) -> float:
    """Image by image, expert by expert."""
    total = 0.0
    classes = range(len(temperature))
    for image in experts:
        mean = [math.fsum(expert[k] for expert in image) / len(image) for k in classes]
        teacher = log_softmax([mean[k] / temperature[k] for k in classes])
        for expert in image:
            said = log_softmax([expert[k] / temperature[k] for k in classes])
            total += math.fsum(math.exp(teacher[k]) * (teacher[k] - said[k]) for k in classes)
    average = math.fsum(temperature) / len(temperature)
    return average**2 * total / len(experts)


def slow_ldam(logits: list[float], label: int, n: list[int]) -> float:
    margin = 0.5 * (n[label] / min(n)) ** (-1 / 4)
    return -log_softmax([z - 30 * margin * (k == label) for k, z in enumerate(logits)])[label]


def draw(b: int, e: int, k: int, seed: int, scale: float = 4.0) -> tuple[Output, Target, Tensor, ClassCounts]:
    """An output with experts, two labels per image, class weights and counts."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.rand(b, e, k, generator=g) * 2 - 1) * scale
    share = torch.rand(b, generator=g)
    target = Target(torch.randint(k, (b, 2), generator=g), torch.stack([share, 1 - share], 1))
    counts = ClassCounts((5000 ** torch.rand(k, generator=g)).long().clamp_min(1))
    output = Output(logits.mean(1), torch.randn(b, e, 6, generator=g), logits)
    return output, target, torch.rand(k, generator=g) + 0.1, counts


def cast(output: Output, dtype: torch.dtype) -> Output:
    assert output.features is not None and output.expert_logits is not None
    return Output(output.logits.to(dtype), output.features.to(dtype), output.expert_logits.to(dtype))


def slow_ride(
    output: Output,
    target: Target,
    weight: Tensor | None,
    counts: ClassCounts,
    rho: float | None,
    reduction: Reduction = "mean",
    diversity: float = -0.45,
) -> float:
    """RIDE on LDAM; `rho` None: before the temperature begins."""
    assert output.expert_logits is not None
    n, z = counts.counts.tolist(), output.expert_logits.double().tolist()
    total = diversity * slow_divergence(z, [1.0] * len(n) if rho is None else slow_temperature(n, rho))
    for labels, shares in zip(target.labels.T.tolist(), target.shares.T.tolist()):
        w = [1.0 if weight is None else float(weight[y]) for y in labels]
        of_label = math.fsum(
            shares[i] * w[i] * slow_ldam(expert, labels[i], n) for i, image in enumerate(z) for expert in image
        )
        total += of_label / (sum(w) if weight is not None and reduction == "weighted-mean" else len(z))
    return total


@given(
    b=st.integers(1, 5),
    e=st.integers(1, 4),
    k=st.integers(2, 6),
    seed=st.integers(0, 999),
    late=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "weighted-mean"]),
    diversity=st.sampled_from([-0.45, 0.0, 0.3]),
)
def test_the_formula(
    b: int, e: int, k: int, seed: int, late: bool, weighted: bool, reduction: Reduction, diversity: float
) -> None:
    output, target, drawn, counts = draw(b, e, k, seed)
    weight, rho = drawn if weighted else None, 0.2 if late else None
    want = slow_ride(output, target, weight, counts, rho, reduction, diversity)
    criterion = RIDE(counts, LDAM(counts), diversity=diversity, rho=0.2, temperature_start=0.5)
    got = criterion(output, target, weight, 0.5 if late else 0.49, reduction)
    assert float(got) == pytest.approx(want, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "k"), [(2, 8142), (7, 10), (40, 2)])
def test_the_formula_of_large_logits(b: int, k: int, dtype: torch.dtype) -> None:
    """±50, and many classes of which nearly all are absent."""
    drawn, target, weight, counts = draw(b, 3, k, 10, scale=50.0)
    output, criterion = cast(drawn, dtype), RIDE(counts, LDAM(counts), rho=0.2, temperature_start=0.5)
    for rho, progress in ((None, 0.0), (0.2, 0.9)):
        want = slow_ride(output, target, weight, counts, rho)
        assert float(criterion(output, target, weight, progress)) == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y", [0, 9])
def test_a_batch_of_one_class(y: int, dtype: torch.dtype) -> None:
    drawn, _, weight, counts = draw(6, 3, 10, 11)
    output, target = cast(drawn, dtype), Target.hard(torch.full((6,), y))
    got = RIDE(counts, LDAM(counts))(output, target, weight, 0.9)
    assert float(got) == pytest.approx(slow_ride(output, target, weight, counts, 0.05), rel=2e-5)


@pytest.mark.parametrize("progress", [0.0, 0.9])
@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_one_expert_without_diversity_is_the_base_loss(name: str, reduction: Reduction, progress: float) -> None:
    output, target, weight, counts = draw(7, 1, 5, 1)
    assert output.features is not None
    plain = Output(output.logits, output.features[:, 0])
    base = LOSSES[name](counts)
    for w in (None, weight):
        want = base(plain, target, w, progress, reduction)
        assert torch.equal(RIDE(counts, base, diversity=0.0)(output, target, w, progress, reduction), want)
        # an expert alone is its own mean, and nothing drives it from itself
        torch.testing.assert_close(RIDE(counts, base)(output, target, w, progress, reduction), want)
    labels = target.labels[:, 0]
    assert torch.equal(RIDE(counts, base).per_label(output, labels, progress), base.per_label(plain, labels, progress))
    assert torch.equal(RIDE(counts, base).probabilities(output), base.probabilities(plain))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_any_base_is_summed_over_the_experts(name: str) -> None:
    """Also one that sees the batch as a whole (LADE), and one that reads features (IB)."""
    output, target, weight, counts = draw(7, 3, 5, 2)
    assert output.features is not None and output.expert_logits is not None
    base = LOSSES[name](counts)
    want = sum(base(Output(output.expert_logits[:, x], output.features[:, x]), target, weight, 0.9) for x in range(3))
    got = RIDE(counts, base, diversity=0.0)(output, target, weight, 0.9)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["ce", "ldam", "focal", "cb-sigmoid", "ib"])
@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
def test_per_label_and_label_free_say_the_same_as_forward(name: str, reduction: Reduction) -> None:
    output, target, weight, counts = draw(6, 3, 5, 3)
    criterion = RIDE(counts, LOSSES[name](counts))
    combined = Criterion.forward(criterion, output, target, weight, 0.9, reduction)
    torch.testing.assert_close(criterion(output, target, weight, 0.9, reduction), combined)


def test_a_label_free_part_of_the_base_is_counted_once_per_expert() -> None:
    class WithFree(CrossEntropy):
        def label_free(self, output: Output, progress: float) -> Tensor:
            return torch.tensor(7.0)

    output, target, weight, counts = draw(6, 3, 5, 3)
    with_free, without = RIDE(counts, WithFree(counts)), RIDE(counts, CrossEntropy(counts))
    torch.testing.assert_close(with_free(output, target, weight), without(output, target, weight) + 21)
    combined = Criterion.forward(with_free, output, target, weight)
    torch.testing.assert_close(with_free(output, target, weight), combined)
    assert RIDE(counts, CrossEntropy(counts), diversity=0.0).label_free(output, 0.0) is None


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_diversity_is_counted_once_whatever_the_mix_and_the_weights(progress: float) -> None:
    output, target, weight, counts = draw(6, 3, 5, 4)
    assert output.expert_logits is not None
    temperature = slow_temperature(counts.counts.tolist(), 0.05) if progress else [1.0] * 5
    want = -0.45 * slow_divergence(output.expert_logits.double().tolist(), temperature)
    assert abs(want) > 0.1
    base = CrossEntropy(counts)
    for mix in (target, Target.hard(target.labels[:, 0]), Target(target.labels, torch.full((6, 2), 0.5))):
        for w in (None, weight, 5 * weight):
            with_it = RIDE(counts, base)(output, mix, w, progress)
            without = RIDE(counts, base, diversity=0.0)(output, mix, w, progress)
            assert float(with_it - without) == pytest.approx(want, rel=1e-4)


def test_the_temperature_follows_the_class_frequencies() -> None:
    got = class_temperature(COUNTS)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(slow_temperature(COUNTS.counts.tolist(), 0.05), rel=1e-12)
    assert got[0] == 1 and bool((got.diff() < 0).all())
    assert float(got[-1]) == pytest.approx((0.95 + 0.5 * 50 / 12406) / (0.95 + 0.5 * 5000 / 12406), rel=1e-12)
    assert class_temperature(ClassCounts(torch.full((4,), 9))).tolist() == pytest.approx([1.0] * 4)
    assert class_temperature(COUNTS, rho=0.0).tolist() == [1.0] * 10


@pytest.mark.parametrize(("epochs", "settings"), [(240, {}), (200, {"temperature_start": 160 / 200})])
def test_the_temperature_begins_at_epoch_160(epochs: int, settings: dict[str, float]) -> None:
    output, *_ = draw(6, 3, 10, 5)
    criterion = RIDE(COUNTS, LDAM(COUNTS), rho=0.5, **settings)
    values = [float(criterion.label_free(output, epoch / epochs)) for epoch in range(epochs)]  # type: ignore[arg-type]
    assert len(set(values[:160])) == 1 and len(set(values[160:])) == 1
    assert abs(values[159] - values[160]) > 1e-3


def test_gradients() -> None:
    """The mean of the experts is a constant to the gradient, so it is held fixed for the finite differences."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 4, dtype=torch.float64, generator=g, requires_grad=True)
    mean, temperature = logits.detach().mean(1), torch.rand(4, dtype=torch.float64, generator=g) + 0.5
    for t in (None, temperature):
        assert torch.autograd.gradcheck(lambda z, t=t: expert_divergence(z, mean, t), (logits,))
        fixed = torch.autograd.grad(expert_divergence(logits, mean, t), logits)[0]
        moving = torch.autograd.grad(expert_divergence(logits, logits.mean(1), t), logits)[0]
        assert torch.equal(fixed, moving)


def test_diversity_is_what_autograd_sees_in_the_whole_loss() -> None:
    """d/dz_e of −.45 T̄² KL(p ‖ q_e) is −.45 T̄² (q_e − p) / (T B): by hand, without autograd."""
    output, target, _, counts = draw(4, 3, 5, 6)
    assert output.expert_logits is not None
    logits = output.expert_logits.requires_grad_()
    seen = Output(logits.mean(1), output.features, logits)
    gradients = [
        torch.autograd.grad(RIDE(counts, CrossEntropy(counts), diversity=d)(seen, target, None, 0.9), logits)[0]
        for d in (-0.45, 0.0)
    ]
    t = class_temperature(counts).float()
    p, q = (logits.mean(1, keepdim=True) / t).softmax(2), (logits / t).softmax(2)
    torch.testing.assert_close(gradients[0] - gradients[1], -0.45 * t.mean() ** 2 * (q - p) / t / 4, atol=1e-6, rtol=0)


def test_a_negative_diversity_drives_experts_apart() -> None:
    output, *_ = draw(8, 3, 5, 7, scale=1.0)
    assert output.expert_logits is not None
    spread = {}
    for diversity in (-0.45, 0.45):
        logits = output.expert_logits.clone().requires_grad_()
        criterion = RIDE(COUNTS, CrossEntropy(COUNTS), diversity=diversity)
        free = criterion.label_free(Output(logits.mean(1), None, logits), 0.0)
        assert free is not None
        free.backward()
        assert logits.grad is not None
        after = logits.detach() - logits.grad
        spread[diversity] = float(expert_divergence(after, after.mean(1)))
    before = float(expert_divergence(output.expert_logits, output.logits))
    assert spread[0.45] < before < spread[-0.45]


def test_bfloat16_logits_are_summed_in_float32() -> None:
    output, target, weight, counts = draw(6, 3, 5, 8)
    rounded = cast(output, torch.bfloat16)
    criterion = RIDE(counts, LDAM(counts))
    got = criterion(rounded, target, weight, 0.9)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, criterion(cast(rounded, torch.float32), target, weight, 0.9))


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]], [[0.0, 0.0], [3e4, -3e4]]], requires_grad=True)
    counts = ClassCounts(torch.tensor([9, 3]))
    loss = RIDE(counts, LDAM(counts))(Output(logits.mean(1), None, logits), Target.hard(torch.tensor([0, 1])), None, 1)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and bool(logits.grad.isfinite().all())


def test_head_steps_and_probabilities_are_the_bases() -> None:
    output, _, _, counts = draw(6, 3, 5, 9)
    for name, base in LOSSES.items():
        wrapped = RIDE(counts, base(counts))
        assert wrapped.head == base(counts).head, name
        assert wrapped.own_steps == base(counts).own_steps, name
    assert RIDE(counts, LOSSES["ib"](counts)).own_steps is not None
    sigmoid = ClassBalancedSigmoid(counts)
    torch.testing.assert_close(
        RIDE(counts, sigmoid).probabilities(output), sigmoid.probabilities(Output(output.logits))
    )
    assert Criterion.head == "linear"  # wrapping changed the one object only


def test_it_is_stateless_and_moves_with_its_base() -> None:
    criterion = RIDE(COUNTS, LDAM(COUNTS))
    assert criterion.state_dict() == {}
    assert {name for name, _ in criterion.named_buffers()} == {"temperature", "base.margin"}


@pytest.mark.parametrize(
    "settings",
    [{"diversity": math.inf}, {"diversity": math.nan}, {"rho": -0.1}, {"rho": 1.1}, {"temperature_start": 1.5}],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ride needs a finite diversity"):
        RIDE(COUNTS, CrossEntropy(COUNTS), **settings)


def test_outputs_that_do_not_fit_are_named() -> None:
    criterion, labels = RIDE(COUNTS, CrossEntropy(COUNTS)), Target.hard(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="needs a model with experts"):
        criterion(Output(torch.zeros(2, 10)), labels)
    for shape in ((2, 18), (2, 2, 9)):
        with pytest.raises(UserError, match=r"must be \[B,3,D\]"):
            criterion(Output(torch.zeros(2, 10), torch.zeros(shape), torch.zeros(2, 3, 10)), labels)
