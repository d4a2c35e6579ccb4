from __future__ import annotations

import errno
import math
import os
import socket
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from otmix.errors import UserError
from otmix.models import build_model, default_backbone, list_backbones, timm_data_config
from otmix.models import timm_backbone as timm_backbone_module
from otmix.models.classifier import Classifier
from otmix.models.heads import NormedHead, SigmoidHead
from otmix.models.resnet_cifar import BasicBlock, CifarResNet
from otmix.models.timm_backbone import takes_images

RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
TIMM = "timm/test_resnet"


def small(backbone: str = "resnet8", num_classes: int = 10, **options: object) -> Classifier:
    return build_model(backbone, num_classes, **({"image_size": 8} | RGB | options))  # type: ignore[arg-type]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("classes", "head", "expected"),
    [(10, "linear", 464_154), (10, "normed", 464_144), (100, "linear", 470_004), (100, "normed", 469_904)],
)
def test_resnet32_has_the_published_size(classes: int, head: str, expected: int) -> None:
    assert parameters(small("resnet32", classes, head=head)) == expected


@pytest.mark.parametrize(("size", "side"), [(32, 8), (8, 2), (9, 3), (1, 1)])
def test_shapes_for_any_side_and_greyscale(size: int, side: int) -> None:
    model = small(channels=1, mean=(0.5,), std=(0.2,), image_size=size).eval()
    images = torch.rand(2, 1, size, size)
    output = model(images)
    assert output.logits.shape == (2, 10)
    assert output.features is not None
    assert output.features.shape == (2, 64) == (2, model.feature_dim)
    assert model.official_features(images).shape == (2, 64 * side * side)


def by_hand(state: dict[str, Tensor], images: Tensor, *, stem_relu: bool) -> Tensor:
    """The last map of a CIFAR ResNet in eval mode, written out: nothing in place, no padding call, no module."""

    def normed(x: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{name}.{key}"][None, :, None, None] for key in keys)
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    x = (images - state["normalise.mean"]) / state["normalise.std"]
    x = normed(functional.conv2d(x, state["backbone.conv1.weight"], padding=1), "backbone.bn1")
    x = x.clamp_min(0) if stem_relu else x
    for stage in (1, 2, 3):
        for block in range(9):
            name = f"backbone.layer{stage}.{block}"
            if f"{name}.conv1.weight" not in state:
                break
            stride = 2 if stage > 1 and block == 0 else 1
            out = functional.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = normed(out, f"{name}.bn1").clamp_min(0)
            out = normed(functional.conv2d(out, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                kept = x[:, :, ::2, ::2]
                nothing = torch.zeros_like(kept[:, : kept.shape[1] // 2])
                x = torch.cat([nothing, kept, nothing], dim=1)
            x = (x + out).clamp_min(0)
    return x


def trained_a_little(model: Classifier) -> Classifier:
    """Running statistics, scales and shifts that are not those of a new network."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
    return model


@pytest.mark.parametrize("backbone", ["resnet8", "resnet20"])
def test_forward_and_official_features_are_those_written_by_hand(backbone: str) -> None:
    model = trained_a_little(small(backbone)).double().eval()
    images = torch.rand(3, 3, 10, 10, dtype=torch.float64)
    output = model(images)
    pooled = by_hand(model.state_dict(), images, stem_relu=True).mean((2, 3))
    torch.testing.assert_close(output.features, pooled)
    torch.testing.assert_close(output.logits, pooled @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(model.features(images), pooled)
    official = model.official_features(images)
    torch.testing.assert_close(official, by_hand(model.state_dict(), images, stem_relu=False).flatten(1))
    assert not torch.allclose(official, by_hand(model.state_dict(), images, stem_relu=True).flatten(1))


def test_gradients_survive_what_is_done_in_place() -> None:
    block = BasicBlock(4, 8, stride=2).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), nondet_tol=0)
    before = x.detach().clone()
    block(x)
    assert torch.equal(x, before)


def test_official_features_of_another_backbone_are_a_mistake_of_the_user() -> None:
    model = small(TIMM, image_size=32)
    assert not model.supports_official
    assert small().supports_official
    with pytest.raises(UserError, match="protocol official works with CIFAR ResNets only"):
        model.official_features(torch.rand(1, 3, 32, 32))


def test_depth_must_be_6n_plus_2() -> None:
    assert list_backbones() == ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56"]
    for depth in (2, 18, 31):
        with pytest.raises(ValueError, match="6n"):
            CifarResNet(depth)


def test_normed_head_gives_scaled_cosines() -> None:
    head = NormedHead(6, 4)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(4))
    features = torch.randn(5, 6)
    with torch.no_grad():
        head.weight.mul_(3.0)
    for i, j in [(0, 0), (4, 3), (2, 1)]:
        cosine = functional.cosine_similarity(features[i], head.weight[j], dim=0)
        torch.testing.assert_close(head(features)[i, j], 30 * cosine)
    assert head(torch.zeros(1, 6)).abs().sum() == 0


def test_normed_head_rounds_no_cosine_under_autocast() -> None:
    head, features = NormedHead(64, 10), torch.randn(32, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head(features)
    want = NormedHead.forward(head.double(), features.double())
    torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-4)
    got.sum().backward()
    assert head.weight.grad is not None


def test_sigmoid_head_starts_at_one_in_k_and_keeps_its_bias_from_decay() -> None:
    model = small(num_classes=5, head="sigmoid")
    assert isinstance(model.head, SigmoidHead)
    torch.testing.assert_close(model.head.bias.sigmoid(), torch.full((5,), 1 / 5))
    assert model.no_weight_decay() == {"head.bias"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert small().no_weight_decay() == set()


def test_weights_follow_kaiming_in_backbone_and_head() -> None:
    model = small("resnet20", 100)
    weight = model.backbone.layer3[1].conv1.weight
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert float(model.head.weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.05)


@pytest.mark.parametrize("backbone", ["resnet8", TIMM])
def test_a_seed_gives_the_same_weights_and_leaves_the_generator_alone(backbone: str) -> None:
    before = torch.get_rng_state()
    first = small(backbone, seed=3, image_size=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert equal(first, small(backbone, seed=3, image_size=32))
    assert not equal(first, small(backbone, seed=4, image_size=32))


def test_state_dict_keys_are_those_of_published_runs() -> None:
    keys = list(small().state_dict())
    assert keys[:4] == ["normalise.mean", "normalise.std", "backbone.conv1.weight", "backbone.bn1.weight"]
    assert "backbone.layer3.0.conv2.weight" in keys
    assert keys[-2:] == ["head.weight", "head.bias"]


def test_compiles_into_one_graph_with_equal_gradients() -> None:
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.rand(4, 3, 8, 8)
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        network(images).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other)


def test_channels_last_changes_nothing() -> None:
    model = small("resnet8").eval()
    images = torch.rand(4, 3, 8, 8)
    expected = model(images).logits
    got = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet33"}, "did you mean .*resnet32"),
        ({"backbone": "resnet18"}, "did you mean timm/resnet18"),
        ({"backbone": "timm/resnet18x"}, "did you mean timm/resnet18 "),
        ({"backbone": "timm/resnet18.no_such_tag"}, r"did you mean timm/resnet18\."),
        ({"backbone": "timm/hf-hub:someone/something"}, "no backbone called"),
        ({"backbone": "timm/qqqqqqqqqq"}, r"timm\.list_models"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"channels": 1}, "1 channels, but mean has 3"),
        ({"head": "cosine"}, "choose linear, normed, sigmoid"),
        ({"pretrained": True}, "no pretrained weights for resnet8; give --weights FILE or --no-pretrained"),
        ({"weights": "nowhere.pt"}, "no weights file nowhere.pt"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**({"backbone": "resnet8"} | options))  # type: ignore[arg-type]


def test_default_backbone_depends_on_the_size_of_the_images() -> None:
    assert [default_backbone(size) for size in (8, 32, 64, 65, 224)] == ["resnet32"] * 3 + ["timm/resnet18"] * 2
    assert default_backbone(224, small=True) == "resnet32"


@pytest.mark.parametrize(("name", "channels"), [("test_resnet", 1), ("test_efficientnet", 3), ("test_vit", 3)])
def test_timm_models_give_features_of_the_stated_size(name: str, channels: int) -> None:
    mean_std = {"mean": (0.5,) * channels, "std": (0.2,) * channels}
    model = small(f"timm/{name}", 4, channels=channels, image_size=64, **mean_std)
    output = model(torch.rand(2, channels, 64, 64))
    assert output.features is not None
    assert output.features.shape == (2, model.feature_dim)
    output.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # DistributedDataParallel needs it
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_timm_data_config_is_the_models_own() -> None:
    size, mean, std = timm_data_config("timm/vit_tiny_patch16_224")
    assert (size, mean, std) == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert timm_data_config(TIMM).image_size == 160
    assert timm_data_config("timm/resnet18.a1_in1k").mean == pytest.approx((0.485, 0.456, 0.406))
    with pytest.raises(UserError, match="no backbone called timm/nothing"):
        timm_data_config("timm/nothing")


@pytest.mark.parametrize(
    ("name", "size", "takes"),
    [("vit_tiny_patch16_224", 32, True), ("vit_tiny_patch16_224", 8, False), ("xcit_nano_12_p16_224", 40, False)],
)
def test_whether_a_timm_model_takes_images_of_a_size(name: str, size: int, takes: bool) -> None:
    before = torch.get_rng_state()
    assert takes_images(f"timm/{name}", 3, size) is takes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and nobody who answers; asking more than the one probe is an error."""
    import huggingface_hub.constants

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(timm_backbone_module.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket.socket, "connect", never)
    return tmp_path


def test_pretrained_without_a_network_says_what_to_do(no_network: Path) -> None:
    with pytest.raises(UserError, match=r"timm/test_resnet cannot be had .*--weights FILE.*--no-pretrained"):
        small(TIMM, pretrained=True)


def test_pretrained_from_the_hubs_cache_needs_no_network(no_network: Path) -> None:
    import timm

    source = timm.create_model("test_resnet")
    repository = no_network / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    safetensors.torch.save_file(source.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    model = small(TIMM, pretrained=True)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("backbone", ["resnet8", TIMM])
def test_a_file_of_ours_fills_the_backbone_and_a_head_that_fits(tmp_path: Path, backbone: str, suffix: str) -> None:
    source, path = small(backbone, seed=1), str(tmp_path / f"w{suffix}")
    if suffix == ".safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:  # as a training script of someone's would have it
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, path)
    assert equal(small(backbone, weights=path, seed=2), source)
    other = small(backbone, 7, weights=path, seed=2, mean=(0.1, 0.2, 0.3))
    assert equal(other.backbone, source.backbone)
    assert equal(other.head, small(backbone, 7, seed=2).head)
    torch.testing.assert_close(other.normalise.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_a_file_of_timm_fills_the_backbone_only_and_fits_the_channels(tmp_path: Path) -> None:
    import timm

    source, path = timm.create_model("test_resnet", num_classes=1000), str(tmp_path / "w.pt")
    torch.save(source.state_dict(), path)
    model = small(TIMM, weights=path, pretrained=True)  # the file comes first, so nothing is downloaded
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    assert equal(model.head, small(TIMM).head)
    grey = small(TIMM, weights=path, channels=1, mean=(0.5,), std=(0.2,))
    torch.testing.assert_close(
        grey.backbone.conv1[0].weight if isinstance(grey.backbone.conv1, nn.Sequential) else grey.backbone.conv1.weight,
        (source.conv1[0] if isinstance(source.conv1, nn.Sequential) else source.conv1).weight.sum(1, keepdim=True),
    )


@pytest.mark.parametrize(
    "wrappers", ["module.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod.module._orig_mod."]
)
def test_weights_saved_through_wrappers(wrappers: str, tmp_path: Path) -> None:
    """DistributedDataParallel around torch.compile, or the other way round."""
    source, path = small(), str(tmp_path / "w.pt")
    torch.save({wrappers + key: value for key, value in source.state_dict().items()}, path)
    assert equal(small(weights=path), source)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_that_may_not_be_read(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"w.{ending}"
    path.write_bytes(b"x")
    plainly = Path.open

    def refuse(self: Path, *rest: Any, **named: Any) -> Any:  # root may read everything, so permissions prove nothing
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plainly(self, *rest, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"{path} cannot be read \(Permission denied\); give it read permission"):
        small(weights=str(path))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"

    def refused(message: str, backbone: str = "resnet8") -> None:
        with pytest.raises(UserError, match=message) as caught:
            small(backbone, weights=str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    torch.save(small("resnet20").state_dict(), path)
    refused("does not fit resnet8 .*Unexpected key")
    state = small().state_dict()
    del state["backbone.layer2.0.conv1.weight"]
    torch.save(state, path)
    refused("does not fit resnet8 .*Missing key.*layer2.0.conv1.weight")
    torch.save(small(TIMM).backbone.state_dict() | {"stray": torch.zeros(1)}, path)
    refused("does not fit timm/test_resnet .*stray", TIMM)
    half = dict(list(small(TIMM).backbone.state_dict().items())[:9])
    torch.save(half, path)
    refused("does not fit timm/test_resnet .*Missing key", TIMM)
    refused("does not fit resnet8 .*backbone")
    torch.save({"epoch": 3}, path)
    refused("holds no state dict")
    path.write_bytes(b"not weights")
    refused("no file of plain weights")
    torch.save(small().state_dict(), path)
    whole = path.read_bytes()
    for size in (0, 1, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("no file of plain weights or is damaged")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not weights either")
    refused("no readable safetensors file")


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_look_folds_batchnorm_into_the_convolutions(channels_last: bool) -> None:
    """In eval mode without gradient the same function, as fewer operations; with gradient it is left alone."""
    model = build_model("resnet20", 10, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.2)
    images = torch.rand(5, 3, 16, 16, generator=draw)
    model.eval()
    exact = model(images)
    assert exact.logits.requires_grad
    with torch.no_grad():
        folded = model(images)
    assert not torch.equal(folded.logits, exact.logits)
    torch.testing.assert_close(
        folded.logits, exact.logits, rtol=1e-3, atol=1e-4 * float(exact.logits.detach().abs().max())
    )
    model.train()
    before = model.backbone.bn1.running_mean.clone()
    with torch.no_grad():
        model(images)
    assert not torch.equal(before, model.backbone.bn1.running_mean)
