from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from otmix.errors import UserError
from otmix.models import build_model, embed, make_embed
from otmix.models.classifier import Classifier
from otmix.models.embedding import eval_mode, networks_of, unwrap
from otmix.types import Batch, Items, Output

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ITEMS = Items(torch.arange(6), torch.arange(6) * 10)


@pytest.fixture
def model() -> Classifier:
    """In training, with running statistics that differ from those of any batch here."""
    model = build_model("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    model(2 * IMAGES)
    return model


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[Tensor | None]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, [module.training for module in model.modules()], [p.grad for p in model.parameters()]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Every buffer and weight bit for bit, every module's mode, no gradient, the random state, and grad mode."""
    state, modes, gradients = snapshot(model)
    random = torch.get_rng_state()
    yield
    after, modes_after, gradients_after = snapshot(model)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert modes_after == modes
    assert all(a is b for a, b in zip(gradients, gradients_after, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def in_eval_mode(model: Classifier) -> tuple[Tensor, Tensor]:
    """The reference: PyTorch's own eval(), on a copy of the weights."""
    copy = build_model("resnet8", 10, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        output = copy.eval()(IMAGES)
    return output.features, output.logits.log_softmax(1)


def test_embed_is_eval_mode_without_gradient_and_without_a_trace(model: Classifier) -> None:
    features, log_probabilities = in_eval_mode(model)
    with untouched(model):
        embedded = embed(model, IMAGES, ITEMS)
    assert torch.equal(embedded.features, features)
    assert embedded.log_probabilities is not None
    assert torch.equal(embedded.log_probabilities, log_probabilities)
    assert embedded.items is ITEMS
    assert not embedded.features.requires_grad
    assert not embedded.features.is_inference()  # may take part in a later graph
    assert embed(model, IMAGES, ITEMS, log_probabilities=False).log_probabilities is None


def test_each_module_gets_its_own_mode_back(model: Classifier) -> None:
    for index, module in enumerate(model.modules()):
        module.training = index % 3 > 0
    with untouched(model):
        embed(model, IMAGES, ITEMS)
    model.eval()
    with untouched(model):
        embed(model, IMAGES, ITEMS)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_modes_come_back_after_an_error(model: Classifier, error: type[BaseException]) -> None:
    model.backbone.bn1.eval()

    def fail(*_: object) -> None:
        raise error

    handle = model.head.register_forward_hook(fail)
    with untouched(model), pytest.raises(error):
        embed(model, IMAGES, ITEMS)
    handle.remove()


def test_eval_mode_reaches_shared_nested_and_absent_modules() -> None:
    shared = nn.BatchNorm1d(2)
    net = nn.Sequential(shared, nn.Sequential(shared, nn.Dropout()), nn.ModuleDict({"a": nn.Linear(2, 2)}))
    net.register_module("absent", None)
    net[1].eval()
    shared.train()
    modes = [module.training for module in net.modules()]
    with eval_mode(net, net[1]):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == modes


class TwoFaced(nn.Module):
    """Someone's model with BatchNorm: `forward` gives logits only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def features(self, images: Tensor) -> Tensor:
        return self.norm(images).mean((2, 3))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Holder:
    def __init__(self, net: TwoFaced) -> None:
        self.net = net

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.both(images)

    def method(self, images: Tensor) -> list[Tensor]:
        return list(self.net.both(images))


NET = TwoFaced()
MODELS = {"student": NET}
NETS = [NET]


class Reaching:
    """Its network is another's."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return named_globally(images)


class Hidden:
    """Nobody sees from outside which network it calls."""

    def __init__(self, net: TwoFaced) -> None:
        self.nets = {"of": {"mine": net}}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.nets["of"]["mine"].both(images)


def named_globally(images: Tensor) -> tuple[Tensor, Tensor]:
    features = NET.features(images)
    return features, NET.head(features)


def two_steps(images: Tensor, net: TwoFaced) -> tuple[Tensor, Tensor]:
    return net.both(images)


def closing_over_an_object(holder: Holder) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def function(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = holder.method(images)
        return functional.leaky_relu(features, 1.0), logits

    return function


def decorated(net: TwoFaced) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def function(images: Tensor) -> tuple[Tensor, Tensor]:
        return net.both(images)

    @functools.wraps(function)
    def wrapper(images: Tensor) -> tuple[Tensor, Tensor]:
        return function(images)

    return wrapper


@pytest.mark.parametrize(
    "make",
    [
        lambda net: net.both,
        lambda net: lambda images: net.both(images),
        lambda net: Holder(net),
        lambda net: Holder(net).method,
        lambda net: functools.partial(TwoFaced.both, net),
        lambda net: functools.partial(two_steps, net=net),
        lambda net: closing_over_an_object(Holder(net)),
        lambda _: lambda images: named_globally(images),
        lambda _: named_globally,
        decorated,
        lambda _: lambda images: MODELS["student"].both(images),
        lambda net: lambda images, nets=NETS: nets[0].both(images),
        lambda _: lambda images: NETS[0].both(images),
        lambda _: Reaching(),
    ],
    ids=[
        "bound",
        "closure",
        "object",
        "method of an object",
        "partial",
        "keyword",
        "closed-over object",
        "helper",
        "global",
        "decorated",
        "dictionary",
        "default",
        "list",
        "object's global",
    ],
)
def test_a_function_of_someones_model_leaves_no_trace_either(make: Callable[[TwoFaced], Callable[..., object]]) -> None:
    NET.train()
    NET(IMAGES + 1)
    function = make(NET)
    assert NET in networks_of(function)
    with untouched(NET):
        embedded = embed(function, IMAGES, ITEMS)
    NET.eval()
    assert torch.equal(embedded.features, NET.features(IMAGES).detach())
    assert embedded.log_probabilities is not None
    assert torch.equal(embedded.log_probabilities, NET(IMAGES).detach().log_softmax(1))


def test_a_network_that_cannot_be_found_is_in_eval_mode_when_it_is_called() -> None:
    net = TwoFaced()
    net.head.eval()
    function = Hidden(net)
    assert networks_of(function) == []
    with untouched(net):
        embedded = embed(function, IMAGES, ITEMS)
    with untouched(net), pytest.raises(UserError, match="features and logits"):
        embed(lambda images: Hidden(net)(images)[1], IMAGES, ITEMS)
    with torch.no_grad():
        assert torch.equal(embedded.features, net.eval().features(IMAGES))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TwoFaced(), r"returned a tensor \[6, 4\], but features and logits are needed; pass a function"),
        (lambda images: {"logits": images}, "returned a dict"),
        (lambda images: Output(images.flatten(1)), "no features"),
    ],
)
def test_a_model_without_features_is_refused(model: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        embed(model, IMAGES, ITEMS)


def test_features_of_experts_are_concatenated() -> None:
    experts = torch.arange(6 * 3 * 4.0).view(6, 3, 4)
    embedded = embed(lambda images: Output(torch.zeros(6, 2), experts), IMAGES, ITEMS)
    assert torch.equal(embedded.features, torch.cat(experts.unbind(1), dim=1))


def test_a_method_may_read_its_logits_in_its_own_way(model: Classifier) -> None:
    with_zero = embed(model, IMAGES, ITEMS, probabilities=lambda output: output.logits.sigmoid().round())
    assert with_zero.log_probabilities is not None
    assert bool(with_zero.log_probabilities.isfinite().all())
    half = embed(model, IMAGES, ITEMS, probabilities=lambda output: torch.full((6, 10), 0.5))
    torch.testing.assert_close(half.log_probabilities, torch.full((6, 10), 0.5).log())


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_low_precision_gives_float32_and_is_used(model: Classifier) -> None:
    exact = embed(model, IMAGES, ITEMS)
    with untouched(model):
        embedded = embed(model, IMAGES, ITEMS, autocast=bfloat16)
    assert embedded.log_probabilities is not None
    assert embedded.features.dtype == embedded.log_probabilities.dtype == torch.float32
    assert not torch.equal(embedded.features, exact.features)
    torch.testing.assert_close(embedded.features, exact.features, atol=0.1, rtol=0.05)
    torch.testing.assert_close(embedded.log_probabilities.exp().sum(1), torch.ones(6))


@pytest.mark.parametrize("autocast", [bfloat16, None])
def test_weights_still_get_gradients_inside_one_autocast(model: Classifier, autocast: object) -> None:
    with bfloat16():
        options = {"autocast": autocast} if autocast else {}
        embedded = embed(model, IMAGES, ITEMS, **options)  # type: ignore[arg-type]
        loss = (model(IMAGES).features * embedded.features).sum() + model(IMAGES).logits.sum()
    loss.backward()
    assert embedded.features.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_compiled_model_makes_one_more_graph_and_stays_compiled(model: Classifier) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    features, _ = in_eval_mode(model)
    compiled = torch.compile(model, backend=backend)
    assert unwrap(compiled) is compiled
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is None
        with untouched(model):
            embedded = embed(compiled, IMAGES, ITEMS)
        torch.testing.assert_close(embedded.features, features)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        compiled(IMAGES)
        assert not torch.equal(model.backbone.bn1.running_mean, state["backbone.bn1.running_mean"])
        model.load_state_dict(state)
    assert len(graphs) == 2


def test_the_forward_of_distributed_training_is_bypassed(model: Classifier, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        features, _ = in_eval_mode(model)
        distributed = DistributedDataParallel(model)
        distributed(IMAGES).logits.sum().backward()  # finds no unused parameter
        assert all(parameter.grad is not None for parameter in model.parameters())
        features, _ = in_eval_mode(model)

        def fail(*_: object) -> None:
            raise AssertionError("DistributedDataParallel was called")

        handle = distributed.register_forward_pre_hook(fail)
        for wrapped in (distributed, torch.compile(distributed, backend="eager")):
            with untouched(distributed):
                assert torch.equal(embed(wrapped, IMAGES, ITEMS).features, features)
        handle.remove()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_fabrics_wrapper_is_bypassed(model: Classifier, compiled: bool) -> None:
    from lightning.fabric import Fabric

    features, _ = in_eval_mode(model)
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup(torch.compile(model, backend="eager") if compiled else model)
    with untouched(model):
        torch.testing.assert_close(embed(wrapped, IMAGES, ITEMS).features, features)


def test_make_embed_reads_the_images_of_items(model: Classifier) -> None:
    def fetch(items: Items) -> Batch:
        return Batch(items, IMAGES[items.labels])

    look = make_embed(model, fetch)
    some = ITEMS[torch.tensor([4, 1])]
    with untouched(model):
        embedded = look(some)
    assert torch.equal(embedded.features, embed(model, IMAGES[[4, 1]], some).features)
    assert embedded.log_probabilities is not None
    assert torch.equal(embedded.items.labels, torch.tensor([4, 1]))
    assert make_embed(model, fetch, log_probabilities=False)(some).log_probabilities is None
