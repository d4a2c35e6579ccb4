"""Backbones cut in two, and RIDE's experts on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from otmix.errors import UserError
from otmix.losses import LDAM, LOSSES, RIDE, CrossEntropy
from otmix.models import Classifier, ExpertClassifier, build_model, embed
from otmix.models.heads import NormedHead
from otmix.models.resnet_cifar import CifarResNet
from otmix.models.split import Branched, split_backbone
from otmix.models.weights import WeightsFile
from otmix.types import ClassCounts, Items, Output, Target

RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
TIMM = "timm/test_resnet"
RESNETS = ["test_resnet", "resnet18", "resnet26d", "seresnext26t_32x4d"]  # stems, shortcuts and attention of all kinds
OTHERS = ["timm/test_vit", "timm/test_efficientnet", "timm/mobilenetv3_small_050"]
COUNTS = ClassCounts(torch.tensor([50, 9, 4]))


def ride(backbone: str = "resnet8", num_classes: int = 3, experts: int = 3, **options: Any) -> ExpertClassifier:
    settings = {"image_size": 32, "architecture": "ride", "experts": experts} | RGB | options
    model = build_model(backbone, num_classes, **settings)
    assert isinstance(model, ExpertClassifier)
    return model


def images(n: int = 4, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# The cut


@pytest.mark.parametrize("cut", ["ride", "bbn"])
@pytest.mark.parametrize("depth", [8, 20, 32])
def test_a_cut_cifar_resnet_computes_what_the_whole_one_does(depth: int, cut: Any) -> None:
    backbone = CifarResNet(depth)
    whole = copy.deepcopy(backbone)
    trunk, branch = split_backbone(backbone, cut)
    for mode in (True, False):
        for part in (trunk, branch, whole):
            part.train(mode)
        assert torch.equal(branch(trunk(images())), whole(images()))
    assert parameters(trunk) + parameters(branch) == parameters(whole)
    blocks = [name for name, module in branch.named_modules() if type(module).__name__ == "BasicBlock"]
    n = (depth - 2) // 6
    own = [f"layer{s}.{i}" for s in (2, 3) for i in range(n)]
    assert blocks == (own if cut == "ride" else own[-1:])


@pytest.mark.parametrize("cut", ["ride", "bbn"])
@pytest.mark.parametrize("name", RESNETS)
def test_a_cut_timm_resnet_computes_what_the_whole_one_does(name: str, cut: Any) -> None:
    import timm

    backbone = timm.create_model(name, num_classes=0)
    whole = copy.deepcopy(backbone)
    trunk, branch = split_backbone(backbone, cut)
    for mode in (True, False):
        for part in (trunk, branch, whole):
            part.train(mode)
        x = images(2, 64)
        assert torch.equal(branch(trunk(x)), whole(x))
    assert parameters(trunk) + parameters(branch) == parameters(whole)
    stages = {key.split(".")[0] for key in branch.state_dict()}
    assert stages == ({"layer3", "layer4"} if cut == "ride" else {"layer4"})
    if cut == "bbn":  # the last block only
        assert {key.split(".")[1] for key in branch.state_dict()} == {str(len(whole.layer4) - 1)}


@pytest.mark.parametrize("cut", ["ride", "bbn"])
@pytest.mark.parametrize("name", OTHERS)
def test_of_other_backbones_nothing_is_shared(name: str, cut: Any) -> None:
    import timm

    backbone = timm.create_model(name.removeprefix("timm/"), num_classes=0)
    trunk, branch = split_backbone(backbone, cut)
    assert isinstance(trunk, nn.Identity)
    assert branch is backbone


def test_a_timm_resnet_that_runs_otherwise_is_not_cut() -> None:
    import timm
    from timm.models.resnet import ResNet

    class Other(ResNet):  # type: ignore[misc, no-any-unimported]
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x.flip(-1))  # type: ignore[no-any-return]

    backbone = timm.create_model("test_resnet", num_classes=0)
    backbone.__class__ = Other
    assert isinstance(split_backbone(backbone, "ride")[0], nn.Identity)


# The model


def count_ride_resnet32(classes: int, experts: int, head: str) -> int:
    """Layer by layer: convolutions without bias, two BatchNorms a block, shortcuts without parameters."""

    def stage(width_in: int, width: int, blocks: int = 5) -> int:
        total = 0
        for block in range(blocks):
            total += 9 * (width_in if block == 0 else width) * width + 9 * width * width + 2 * 2 * width
        return total

    stem = 9 * 3 * 16 + 2 * 16
    own = stage(16, 24) + stage(24, 48) + 48 * classes + (classes if head == "linear" else 0)
    return stem + stage(16, 16) + experts * own


@pytest.mark.parametrize(
    ("classes", "experts", "head", "known"),
    [
        (10, 3, "normed", 770_896),
        (10, 3, "linear", 770_926),
        (100, 3, "normed", 783_856),
        (100, 4, "normed", 1_037_200),
        (10, 2, "normed", 521_872),
    ],
)
def test_resnet32_has_the_size_of_rides(classes: int, experts: int, head: str, known: int) -> None:
    model = ride("resnet32", classes, experts, head=head)
    print(f"ResNet-32 with {experts} experts, {classes} classes, {head} heads: {parameters(model)} parameters")
    assert parameters(model) == known == count_ride_resnet32(classes, experts, head)


@pytest.mark.parametrize("backbone", ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56"])
def test_every_cifar_resnet_has_experts(backbone: str) -> None:
    model = ride(backbone, experts=2).eval()
    output = model(images(2))
    assert output.features is not None and output.expert_logits is not None
    assert output.features.shape == (2, 2, 48) == (2, 2, model.feature_dim)
    assert output.expert_logits.shape == (2, 2, 3) and output.logits.shape == (2, 3)


@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("head", ["linear", "normed", "sigmoid"])
@pytest.mark.parametrize("backbone", ["resnet8", TIMM])
def test_logits_are_the_mean_of_experts_computed_one_by_one(backbone: str, head: str, experts: int) -> None:
    model = ride(backbone, experts=experts, head=head).eval()
    x = images()
    output = model(x)
    shared = model.backbone.trunk((x - model.normalise.mean) / model.normalise.std)  # type: ignore[operator, union-attr]
    logits = []
    for e in range(experts):
        features = model.backbone.branches[e](shared)  # type: ignore[index, union-attr, operator]
        torch.testing.assert_close(output.features[:, e], features)  # type: ignore[index]
        logits.append(model.head[e](features))  # type: ignore[index, operator]
        torch.testing.assert_close(output.expert_logits[:, e], logits[-1])  # type: ignore[index]
    torch.testing.assert_close(output.logits, sum(logits) / experts)
    assert torch.equal(model.features(x), output.features)  # type: ignore[arg-type]
    if head == "normed":
        assert all(isinstance(one, NormedHead) and one.scale == 30 for one in model.head)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [TIMM, "timm/test_vit"])
def test_one_expert_of_a_timm_model_is_the_plain_classifier(name: str) -> None:
    """Its parts are made in the same order, so the seed gives it the same weights; in training, too."""
    one, plain = ride(name, experts=1, seed=5, image_size=64), build_model(name, 3, image_size=64, seed=5, **RGB)
    for mode in (True, False):
        got, want = one.train(mode)(images(2, 64)), plain.train(mode)(images(2, 64))
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.features[:, 0], want.features)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("resnet8", 8), ("resnet32", 32), ("timm/resnet18", 64), *((name, 64) for name in OTHERS)],
)
def test_any_backbone_trains_and_every_parameter_gets_a_gradient(backbone: str, size: int) -> None:
    model = ride(backbone, experts=2, image_size=size, head="normed").train()
    output = model(images(4, size))
    RIDE(COUNTS, LDAM(COUNTS))(output, Target.hard(torch.tensor([0, 1, 2, 0]))).backward()
    assert output.features is not None and output.features.shape == (4, 2, model.feature_dim)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_experts_train_to_fit_a_batch() -> None:
    model = ride("resnet8", image_size=16, head="linear").train()
    x, target, criterion = images(9, 16), Target.hard(torch.arange(9) % 3), RIDE(COUNTS, CrossEntropy(COUNTS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        output = model(x)
        optimizer.zero_grad()
        criterion(output, target).backward()
        optimizer.step()
    assert output.logits.argmax(1).tolist() == target.labels[:, 0].tolist()
    assert output.expert_logits is not None
    assert not torch.allclose(output.expert_logits[:, 0], output.expert_logits[:, 1], atol=0.1)


@pytest.mark.parametrize("backbone", ["resnet8", TIMM, "timm/test_vit"])
def test_a_seed_gives_the_same_weights_and_each_expert_its_own(backbone: str) -> None:
    before = torch.get_rng_state()
    first = ride(backbone, seed=3, image_size=64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert equal(first, ride(backbone, seed=3, image_size=64))
    assert not equal(first, ride(backbone, seed=4, image_size=64))
    network = first.backbone
    assert isinstance(network, Branched)
    assert not equal(network.branches[0], network.branches[1]) and not equal(network.branches[1], network.branches[2])
    assert not torch.equal(first.head[0].weight, first.head[1].weight)  # type: ignore[index]


def test_more_experts_leave_the_first_as_they_are() -> None:
    two, three = ride(experts=2, seed=1), ride(experts=3, seed=1)
    assert equal(two.backbone.trunk, three.backbone.trunk)  # type: ignore[arg-type]
    for e in range(2):
        assert equal(two.backbone.branches[e], three.backbone.branches[e])  # type: ignore[index, union-attr]


def test_eval_mode_leaves_no_trace_and_train_mode_moves_the_statistics() -> None:
    model = ride().eval()
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(model(images()).logits, model(images()).logits)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.train()(images())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert moved == {key for key in before if "running" in key or "num_batches" in key}


def test_embedding_concatenates_the_experts() -> None:
    model = ride().train()
    items = Items(torch.zeros(4, dtype=torch.int64))
    got = embed(model, images(), items, probabilities=RIDE(COUNTS, CrossEntropy(COUNTS)).probabilities)
    assert model.training
    output = model.eval()(images())
    torch.testing.assert_close(got.features, torch.cat([output.features[:, e] for e in range(3)], 1).detach())
    assert got.log_probabilities is not None
    torch.testing.assert_close(got.log_probabilities, output.logits.detach().log_softmax(1))


def test_official_features_are_each_experts_last_map_without_the_stems_relu() -> None:
    model = ride("resnet20", experts=2).double().eval()
    x = images(size=16).double()
    network = model.backbone
    assert isinstance(network, Branched) and model.supports_official
    trunk = dict(network.trunk.named_children())
    shared = trunk["layer1"](trunk["bn1"](trunk["conv1"](model.normalise(x))))
    assert (trunk["bn1"](trunk["conv1"](model.normalise(x))) < 0).any()
    want = [dict(branch.named_children()) for branch in network.branches]
    maps = [parts["layer3"](parts["layer2"](shared)) for parts in want]
    got = model.official_features(x)
    assert got.shape == (4, 2 * 48 * 4 * 4)
    torch.testing.assert_close(got, torch.cat([one.flatten(1) for one in maps], 1))


def test_official_features_of_another_backbone_are_a_mistake_of_the_user() -> None:
    model = ride(TIMM)
    assert not model.supports_official
    with pytest.raises(UserError, match="protocol official works with CIFAR ResNets only"):
        model.official_features(images())


def test_what_must_not_decay_keeps_its_place() -> None:
    assert ride(head="sigmoid", experts=2).no_weight_decay() == {"head.0.bias", "head.1.bias"}
    assert ride().no_weight_decay() == set()
    plain = build_model("timm/test_vit", 3, image_size=64, **RGB).no_weight_decay()
    assert plain
    want = {name.replace("backbone.", f"backbone.branches.{e}.", 1) for name in plain for e in range(2)}
    assert ride("timm/test_vit", experts=2, image_size=64).no_weight_decay() == want


def test_one_image_is_a_batch() -> None:
    assert ride().train()(images(1)).logits.shape == (1, 3)


def test_greyscale_and_odd_sides() -> None:
    model = ride(channels=1, mean=(0.5,), std=(0.2,), image_size=9)
    assert model(images(2, 9, 1)).logits.shape == (2, 3)


@pytest.mark.parametrize("backbone", ["resnet8", TIMM])
def test_channels_last_changes_nothing(backbone: str) -> None:
    model = ride(backbone).eval()
    expected = model(images()).expert_logits
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = model(images().to(memory_format=torch.channels_last)).expert_logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "normed"])
def test_bfloat16_autocast(head: str) -> None:
    model = ride(head=head).train()
    expected = model(images()).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    loss = RIDE(COUNTS, LDAM(COUNTS))(output, Target.hard(torch.tensor([0, 1, 2, 0])))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(
        output.logits.float(), expected, rtol=0.1, atol=0.05 * float(expected.detach().abs().max())
    )


def test_compiles_into_one_graph_with_equal_gradients() -> None:
    model = ride()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        output: Output = network(images())
        output.expert_logits.square().mean().backward()  # type: ignore[union-attr]
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other)


# Weights


@pytest.mark.parametrize("backbone", ["resnet8", TIMM, "timm/test_vit"])
def test_a_saved_model_loads_back(tmp_path: Path, backbone: str) -> None:
    source, path = ride(backbone, seed=1, image_size=64).train(), tmp_path / "model.safetensors"
    source(images(2, 64))  # running statistics that are not new
    safetensors.torch.save_file(source.state_dict(), path)
    again = ride(backbone, seed=2, image_size=64)
    again.load_state_dict(safetensors.torch.load_file(path))
    assert torch.equal(source.eval()(images(2, 64)).logits, again.eval()(images(2, 64)).logits)
    assert equal(ride(backbone, seed=3, image_size=64, weights=str(path)), source)
    other = ride(backbone, 7, seed=3, image_size=64, weights=str(path))
    assert equal(other.backbone, source.backbone)
    assert equal(other.head, ride(backbone, 7, seed=3, image_size=64).head)


def test_keys_say_which_part_is_whose() -> None:
    keys = list(ride(experts=2).state_dict())
    assert "backbone.trunk.conv1.weight" in keys and "backbone.trunk.layer1.0.conv1.weight" in keys
    assert "backbone.branches.1.layer3.0.conv2.weight" in keys
    assert keys[-4:] == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]


def test_files_of_another_architecture_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            build_model(
                **({"backbone": "resnet8", "num_classes": 3, "image_size": 32, "weights": str(path)} | RGB | options)
            )
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    safetensors.torch.save_file(build_model("resnet8", 3, image_size=32, **RGB).state_dict(), path)
    refused(
        r"does not fit resnet8 with 3 experts \(Missing key.*saved from a resnet8 with 3 experts", architecture="ride"
    )
    refused("does not fit resnet8 with two branches", architecture="bbn")
    safetensors.torch.save_file(ride(experts=3).state_dict(), path)
    refused("does not fit resnet8 with 2 experts .*Unexpected key", architecture="ride", experts=2)
    refused("does not fit resnet8 with 4 experts .*Missing key", architecture="ride", experts=4)
    refused("does not fit resnet8 .*Missing key")
    refused("does not fit timm/test_resnet with 3 experts", backbone=TIMM, architecture="ride")


def test_weights_of_timm_are_in_every_copy(tmp_path: Path) -> None:
    import timm

    for name, size in (("test_resnet", 32), ("test_vit", 160)):
        source, path = timm.create_model(name, num_classes=1000), str(tmp_path / "w.pt")
        torch.save(source.state_dict(), path)
        model = ride(f"timm/{name}", experts=2, weights=path, image_size=size)
        wanted, network = source.state_dict(), model.backbone
        assert isinstance(network, Branched)
        found = 0
        for part in (network.trunk, *network.branches):
            for key, value in part.state_dict().items():
                assert torch.equal(value, wanted[key]), key
                found += value.numel()
        assert found > 1.5 * sum(value.numel() for key, value in wanted.items() if not key.startswith(("fc", "head")))
        assert not torch.equal(model.head[0].weight, model.head[1].weight)  # type: ignore[index]


def test_pretrained_weights_are_asked_for_every_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from otmix.models import build

    real, asked = build.timm_backbone, []

    def recorded(name: str, **options: Any) -> tuple[nn.Module, int]:
        asked.append(options["pretrained"])
        return real(name, **(options | {"pretrained": False}))

    monkeypatch.setattr(build, "timm_backbone", recorded)
    ride(TIMM, experts=3, pretrained=True)
    assert asked == [True] * 3
    with pytest.raises(UserError, match="no pretrained weights for resnet8"):
        ride(pretrained=True)


def test_a_plain_file_still_fills_a_plain_model(tmp_path: Path) -> None:
    source, path = build_model("resnet8", 3, image_size=32, seed=1, **RGB), tmp_path / "w.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    assert WeightsFile.read(str(path)).is_ours
    got = build_model("resnet8", 3, image_size=32, seed=2, weights=str(path), **RGB)
    assert type(got) is Classifier and equal(got, source)


@pytest.mark.parametrize("experts", [0, -1, 9])
def test_a_number_of_experts_that_is_none_is_named(experts: int) -> None:
    with pytest.raises(UserError, match=f"1 to 8 experts, not {experts}"):
        ride(experts=experts)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UserError, match="no architecture called moe; choose plain, ride, bbn"):
        build_model("resnet8", 3, image_size=32, architecture="moe", **RGB)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"did you mean .*resnet32"):  # as for a plain model
        ride("resnet33")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_has_its_heads(name: str) -> None:
    criterion = RIDE(COUNTS, LOSSES[name](COUNTS))
    model = ride(head=criterion.head, experts=2).train()
    criterion(model(images()), Target.hard(torch.tensor([0, 1, 2, 0])), None, 0.9).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
