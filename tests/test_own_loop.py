"""OTmix in someone's own loop."""

import copy
import io
import re
import runpy
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from otmix.errors import UserError
from otmix.mixer import MixSchedule
from otmix.mixing import CutMix, Mixup
from otmix.own_loop import OTMixer
from otmix.pairing import ConfusionPairing, Curriculum, IndexPairing, Pairing, PairingContext, TransportPairing
from otmix.randomness import Moment
from otmix.types import Embed, Items, Pairs

EXAMPLES = Path(__file__).parents[1] / "examples"


class Net(nn.Module):
    """Plain PyTorch, with BatchNorm to notice who looks at it how."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(images))
        return out


def dataset() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    images = torch.rand(60, 1, 8, 8, generator=g) * 0.3 + labels[:, None, None, None] * 0.3
    return TensorDataset(images, labels)


def make(net: Net, **options: object) -> OTMixer:
    def features_and_logits(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = net.body(images)
        return features, net.head(features)

    options.setdefault("schedule", MixSchedule())
    return OTMixer(features_and_logits, dataset().tensors[1], epochs=4, **options)  # type: ignore[arg-type]


def train(mixer: OTMixer, net: Net, epochs: int, optimizer: torch.optim.Optimizer) -> None:
    criterion = nn.CrossEntropyLoss(reduction="none")
    data = dataset()
    foregrounds = mixer.foreground_loader(data, batch_size=16)
    while mixer.epoch < epochs:
        loader = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(mixer.epoch))
        for background, foreground in zip(loader, foregrounds):
            mixed = mixer(background, foreground)
            loss = mixed.loss(criterion, net(mixed.images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mixer.end_epoch()


def replayed(mixer: OTMixer, epoch: int, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """What a training would give the network in an epoch."""
    mixer.load_state_dict(mixer.state_dict() | {"epoch": epoch, "step": 0})
    loader = list(loader)
    return [mixer(*pair).images for pair in zip(loader, mixer.foreground_loader(dataset(), len(loader[0][0])))]


def running(net: Net) -> torch.Tensor:
    """Both statistics of its BatchNorm, `[2,8]`."""
    norm = net.body[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return torch.stack((norm.running_mean, norm.running_var)).clone()


def means(net: Net, batches: list[torch.Tensor]) -> torch.Tensor:
    """What PyTorch's own `update_bn` makes of them."""
    shown = copy.deepcopy(net)
    update_bn(batches, shown)
    return running(shown)


def test_trains_and_learns_a_confusion() -> None:
    torch.manual_seed(0)
    net = Net()
    mixer = make(net, pairing=TransportPairing())
    train(mixer, net, 4, torch.optim.SGD(net.parameters(), 0.1))
    assert mixer.confusion is not None
    torch.testing.assert_close(mixer.confusion.matrix.sum(1), torch.ones(3))


def test_fewer_foregrounds_than_backgrounds_are_refused_and_more_are_cut() -> None:
    images, labels = dataset().tensors
    mixer = make(Net())
    assert len(mixer((images[:8], labels[:8]), (images[:16], labels[:16])).images) == 8
    with pytest.raises(UserError, match="batch_size=16"):
        mixer((images[:16], labels[:16]), (images[:8], labels[:8]))


def test_resumes_bit_for_bit() -> None:
    def fresh() -> tuple[Net, OTMixer, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = Net()
        return net, make(net), torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    net, mixer, optimizer = fresh()
    train(mixer, net, 4, optimizer)

    half, half_mixer, half_optimizer = fresh()
    train(half_mixer, half, 2, half_optimizer)
    saved = half.state_dict(), half_mixer.state_dict(), half_optimizer.state_dict()
    other, other_mixer, other_optimizer = fresh()
    other.load_state_dict(saved[0])
    other_mixer.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    train(other_mixer, other, 4, other_optimizer)
    for a, b in zip(net.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("given", "want"), [({}, (1.0, 1.0, 1.0)), ({"r": 1.0}, (1 / 40, 1 / 15, 1 / 5))])
def test_the_foreground_loader_follows_its_law_and_the_epoch(given: dict[str, float], want: tuple[float, ...]) -> None:
    mixer = make(Net(), **given)
    loader = mixer.foreground_loader(dataset(), batch_size=16)
    epochs = []
    for _ in range(3):
        epochs.append(torch.cat([labels for _, labels in islice(loader, 4)]))
        mixer.end_epoch()
    share = torch.bincount(torch.cat(epochs), minlength=3) / (3 * 64)
    assert (share - torch.tensor(want) / sum(want)).abs().max() < 0.12
    assert not torch.equal(epochs[0], epochs[1])


def test_workers_draw_the_same_foregrounds() -> None:
    mixer = make(Net())
    loaders = (mixer.foreground_loader(dataset(), 16, num_workers=n) for n in (0, 2))
    alone, two = (torch.cat([y for _, y in islice(loader, 4)]) for loader in loaders)
    assert torch.equal(alone, two)


def test_two_processes_draw_different_parts_of_one_stream() -> None:
    whole = list(islice(make(Net()).foreground_loader(dataset(), 16).sampler, 64))
    loaders = (make(Net(), rank=r, world=2).foreground_loader(dataset(), 8) for r in (0, 1))
    first, second = (list(islice(loader.sampler, 32)) for loader in loaders)
    assert sorted(first + second) == sorted(whole)
    assert first != second


def test_a_shorter_last_batch_of_backgrounds() -> None:
    data = dataset()
    mixer = make(Net(), pairing=TransportPairing())
    mixed = mixer((data.tensors[0][:5], data.tensors[1][:5]), (data.tensors[0][40:56], data.tensors[1][40:56]))
    assert len(mixed.images) == 5


def test_the_model_is_left_as_it_was_under_amp_accumulation_and_compile() -> None:
    torch.manual_seed(0)
    net = Net()
    net.body[1].eval()  # a frozen BatchNorm
    compiled = torch.compile(net, backend="eager")
    mixer = make(net, pairing=TransportPairing())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    data, criterion = dataset().tensors, nn.CrossEntropyLoss(reduction="none")
    before = net.body[1].running_mean.clone()
    for _ in range(2):  # two batches, one step
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = mixer((data[0][:16], data[1][:16]), (data[0][-16:], data[1][-16:]))
            loss = mixed.loss(criterion, compiled(mixed.images))
        loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    optimizer.step()
    assert torch.equal(net.body[1].running_mean, before)
    assert net.training
    assert not net.body[1].training


def test_a_scalar_loss_is_refused_with_the_remedy() -> None:
    data = dataset().tensors
    mixed = make(Net())((data[0][:4], data[1][:4]), (data[0][-4:], data[1][-4:]))
    with pytest.raises(ValueError, match="reduction='none'"):
        mixed.loss(nn.CrossEntropyLoss(), torch.zeros(4, 3))


def test_validation_batches_give_the_confusion() -> None:
    net, data = Net(), dataset().tensors
    mixer = make(net)
    mixer.end_epoch(validation=[data])
    assert mixer.confusion is not None
    assert mixer.confusion.origin.split == "validation"
    said = net.eval()(data[0]).argmax(1)
    for k in range(3):
        want = torch.bincount(said[data[1] == k], minlength=3) / (data[1] == k).sum()
        torch.testing.assert_close(mixer.confusion.matrix[k], want)


def test_as_a_transform_with_soft_labels() -> None:
    data = dataset()
    mixer = make(Net())
    transform = mixer.as_transform(mixer.foreground_loader(data, batch_size=16))
    for _ in range(6):  # more batches than the foreground loader has
        images, soft = transform(data.tensors[0][:16], data.tensors[1][:16])
        assert images.shape == (16, 1, 8, 8)
        torch.testing.assert_close(soft.sum(1), torch.ones(16))
    assert (soft > 0).sum(1).max() == 2


def test_bad_use_is_explained() -> None:
    with pytest.raises(UserError, match="number of epochs"):
        OTMixer(Net(), [0, 1], epochs=0)
    data = dataset().tensors
    featureless = OTMixer(Net(), data[1], 4, pairing=TransportPairing(), schedule=MixSchedule())
    with pytest.raises(UserError, match="features and logits are needed"):
        featureless((data[0][:4], data[1][:4]), (data[0][-4:], data[1][-4:]))
    mixer = make(Net())
    with pytest.raises(UserError, match="2 classes"):
        mixer.load_state_dict(OTMixer(Net(), [0, 1], epochs=4).state_dict())


@pytest.mark.parametrize("script", ["own_loop.py", "soft_labels.py"])
def test_the_examples_run_and_are_short(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len((EXAMPLES / script).read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [script, "--epochs", "2"])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert "test accuracy" in capsys.readouterr().out


def estimate_in_one_of_two(rank: int, folder: str) -> None:
    """(In the children.)"""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)  # the same network in both
    net, (images, labels) = Net(), dataset().tensors
    mixer = make(net, rank=rank, world=2, pairing=TransportPairing())
    mine = (images[rank::2], labels[rank::2])
    mixer(mine, mine)
    counted = mixer.counter.table.value.clone()
    mixer.end_epoch()
    validated = make(net, rank=rank, world=2)
    validated.end_epoch([mine])
    assert mixer.confusion is not None
    assert validated.confusion is not None
    found = {"counted": counted, "F": mixer.confusion.matrix, "validation": validated.confusion.matrix}
    loader = [mine] * 70
    own = means(net, replayed(make(net, rank=rank, world=2), 3, loader))
    mixer = make(net, rank=rank, world=2)
    wrapped = nn.parallel.DistributedDataParallel(net)
    assert mixer.mix_statistics(wrapped, loader, mixer.foreground_loader(dataset(), 30))
    found |= {"own means": own, "means": running(net)}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_several_processes_estimate_one_confusion(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(estimate_in_one_of_two, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    total = one["counted"] + other["counted"]
    assert not torch.equal(one["counted"], other["counted"])
    torch.testing.assert_close(one["F"], total / total.sum(1, keepdim=True))
    assert torch.equal(one["F"], other["F"])
    assert torch.equal(one["validation"], other["validation"])
    assert not torch.equal(one["own means"], other["own means"])
    torch.testing.assert_close(one["means"], (one["own means"] + other["own means"]) / 2)
    assert torch.equal(one["means"], other["means"])


@pytest.mark.parametrize("label", [7, -1])
def test_labels_out_of_range_are_named(label: int) -> None:
    torch.manual_seed(0)
    mixer = make(Net())
    images = torch.rand(3, 1, 8, 8)
    good, bad = (images, torch.tensor([0, 1, 2])), (images, torch.tensor([0, label, 2]))
    said = f"label {label} is out of range: OTMixer was given the labels of 3 classes"
    for background, foreground in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=said):
            mixer(background, foreground)
    with pytest.raises(ValueError, match=said):
        mixer.end_epoch([good, bad])
    assert (mixer.epoch, mixer.step) == (0, 0)
    mixer(good, good)


def first_and_last() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A batch of common images, and one with rare ones."""
    images, labels = dataset().tensors
    return (images[:16], labels[:16]), (images[-16:], labels[-16:])


def test_the_defaults_are_those_of_the_clean_protocol() -> None:
    mixer = OTMixer(Net(), dataset().tensors[1], epochs=240)
    built = mixer.batch_mixer
    assert built.schedule == MixSchedule(0.5, (4 / 240, 237 / 240), 1.0)
    assert built.pairing == Curriculum(built.pairing.first, built.pairing.then, 1.0, "batch", True)  # type: ignore[attr-defined]
    assert isinstance(built.pairing.first, IndexPairing)
    assert isinstance(built.pairing.then, TransportPairing)
    assert built.mixer == CutMix(4.0, "exact", "batch")
    assert mixer.counter.decay == 0.9


def test_each_call_has_a_moment_of_its_own() -> None:
    mixer = make(Net(), seed=7, rank=1, world=2, pairing=IndexPairing())
    moments = []
    for _ in range(2):
        for _ in range(2):
            moments.append(mixer.moment)
            mixer(*first_and_last())
        mixer.end_epoch()
    assert moments == [Moment(7, 0, epoch, 4, step, rank=1) for epoch in range(2) for step in range(2)]


def test_resumes_within_an_epoch() -> None:
    one, other = (make(Net(), pairing=IndexPairing()) for _ in range(2))
    for _ in range(3):
        one(*first_and_last())
    other.load_state_dict(one.state_dict())
    assert other.moment == one.moment
    assert torch.equal(other(*first_and_last()).images, one(*first_and_last()).images)


def test_the_pairing_is_shown_the_confusion_of_the_epoch_before() -> None:
    shown = []

    class Watching(IndexPairing):
        def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs:
            shown.append(context.confusion)
            return super().__call__(foreground, background, embed, context)

    mixer = make(Net(), pairing=Watching())
    mixer(*first_and_last())
    mixer.end_epoch(validation=[dataset().tensors])
    mixer(*first_and_last())
    assert shown == [None, mixer.confusion]
    assert mixer.confusion is not None


@pytest.mark.parametrize("validated", [False, True])
def test_what_was_streamed_fades_with_each_epoch(validated: bool) -> None:
    mixer = make(Net(), pairing=TransportPairing())
    mixer(*first_and_last())
    counted = mixer.counter.table.value.clone()
    for epoch in range(1, 3):
        mixer.end_epoch([dataset().tensors] if validated else None)
        torch.testing.assert_close(mixer.counter.table.value, counted * 0.9**epoch)
    assert float(counted.sum()) == pytest.approx(16)


def test_foregrounds_of_another_dataset_are_refused() -> None:
    images, labels = dataset().tensors
    with pytest.raises(UserError, match="the foreground dataset has 59 images, but OTMixer was given 60 labels"):
        make(Net()).foreground_loader(TensorDataset(images[1:], labels[1:]), batch_size=16)


@pytest.mark.parametrize(("epochs", "refused"), [(2, True), (3, False), (4, True), (5, False)])
def test_a_training_that_would_mix_nothing_is_refused(epochs: int, refused: bool) -> None:
    """The window's first edge belongs to it, its last does not."""
    schedule = MixSchedule(window=(0.6, 0.75))
    with pytest.raises(UserError, match="OTMixer would mix nothing") if refused else nullcontext():
        OTMixer(Net(), dataset().tensors[1], epochs, schedule=schedule)


# ---- the two loaders


def backgrounds(batch_size: int, drop_last: bool = False) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(dataset(), batch_size, shuffle=True, drop_last=drop_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_backgrounds_longer_than_the_dataset_lose_nothing(workers: int) -> None:
    """A sampler of 10 N images, as for long tails; and no foregrounds come twice."""
    mixer = make(Net(), pairing=IndexPairing())
    weighted = WeightedRandomSampler(torch.ones(60), 600)
    loader = DataLoader(dataset(), 16, sampler=weighted)
    foregrounds = mixer.foreground_loader(dataset(), 16, num_workers=workers, persistent_workers=workers > 0)
    drawn = []
    for _ in range(2):
        labels = []
        for background, foreground in zip(loader, foregrounds):
            mixer(background, foreground)
            labels.append(tuple(foreground[1].tolist()))
        assert mixer.step == len(loader) == 38
        drawn += labels
        mixer.end_epoch()
    assert len(set(drawn)) > 70


def test_a_loader_without_end_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(make(Net()).foreground_loader(dataset(), 16))


@pytest.mark.parametrize("size", [7, 16, 20, 32, 59, 60, 128])
@pytest.mark.parametrize("drops", [(False, False), (True, False), (False, True)])
def test_a_short_last_batch_is_cut_in_every_epoch(size: int, drops: tuple[bool, bool]) -> None:
    mixer = make(Net(), pairing=IndexPairing())
    foregrounds = mixer.foreground_loader(dataset(), size, drop_last=drops[1])
    for _ in range(3):
        seen = sum(len(mixer(*pair).images) for pair in zip(backgrounds(size, drops[0]), foregrounds))
        assert seen == (60 // size * size if drops[0] else 60)
        mixer.end_epoch()


@pytest.mark.parametrize(("own", "foreign"), [(16, 32), (16, 128), (31, 32), (30, 60)])
def test_larger_foreground_batches_are_cut_and_lose_no_background(own: int, foreign: int) -> None:
    mixer = make(Net(), pairing=IndexPairing())
    foregrounds = mixer.foreground_loader(dataset(), foreign)
    assert sum(len(mixer(*pair).images) for pair in zip(backgrounds(own), foregrounds)) == 60


def test_a_part_of_the_backgrounds_for_each_process() -> None:
    images, labels = dataset().tensors
    mixer = make(Net(), rank=1, world=2, pairing=IndexPairing())
    loader = DataLoader(TensorDataset(images[1::2], labels[1::2]), 16)
    foregrounds = mixer.foreground_loader(dataset(), 16)
    for _ in range(2):
        assert sum(len(mixer(*pair).images) for pair in zip(loader, foregrounds)) == 30
        mixer.end_epoch()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixer_resumed_within_an_epoch_gets_the_foregrounds_that_were_next(workers: int) -> None:
    def fresh() -> tuple[OTMixer, DataLoader[tuple[torch.Tensor, ...]]]:
        mixer = make(Net(), pairing=IndexPairing())
        return mixer, mixer.foreground_loader(dataset(), 16, num_workers=workers)

    (mixer, foregrounds), batches = fresh(), list(backgrounds(16))
    images, state = [], {}
    for background, foreground in zip(batches, foregrounds):
        images.append(mixer(background, foreground).images)
        if mixer.step == 2:
            state = mixer.state_dict()
    other, foregrounds = fresh()
    other.load_state_dict(state)
    resumed = [other(*pair).images for pair in zip(batches[2:], foregrounds)]
    assert len(resumed) == 2
    for found, want in zip(resumed, images[2:]):
        assert torch.equal(found, want)


def test_forgetting_end_epoch_shows_in_the_second_pass() -> None:
    mixer = make(Net(), pairing=IndexPairing())
    foregrounds = mixer.foreground_loader(dataset(), 16)
    next(iter(foregrounds))  # a look at them counts for nothing
    for pair in zip(backgrounds(16, drop_last=True), foregrounds):
        mixer(*pair)
    with pytest.raises(UserError, match=r"epoch 0, after 3 steps; call end_epoch\(\) after each pass"):
        next(zip(backgrounds(16), foregrounds))
    next(iter(mixer.foreground_loader(dataset(), 16)))  # another loader's first pass
    mixer.end_epoch()
    next(zip(backgrounds(16), foregrounds))


@pytest.mark.parametrize("workers", [0, 2])
def test_foregrounds_in_another_order_than_the_labels_are_refused(workers: int) -> None:
    images, labels = dataset().tensors
    mixer = make(Net())
    foregrounds = mixer.foreground_loader(TensorDataset(images.flip(0), labels.flip(0)), 16, num_workers=workers)
    with pytest.raises(UserError, match=r"^image \d+ of the foreground dataset has label \d, but \d among the labels"):
        next(zip(backgrounds(16), foregrounds))


def test_batches_of_another_form_come_as_they_are() -> None:
    """The loader looks at pairs of images and labels; of the rest the mixer is told by its caller."""

    def as_dict(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"image": torch.stack([image for image, _ in batch])}

    assert len(next(iter(make(Net()).foreground_loader(dataset(), 16, collate_fn=as_dict)))["image"]) == 16


# ---- as a transform


def test_a_transform_resumes_with_a_loader_that_drops_its_last_batch() -> None:
    """Its foregrounds begin anew in each epoch, so that none is left over."""

    def train(mixer: OTMixer, epochs: range) -> list[torch.Tensor]:
        transform, images = mixer.as_transform(mixer.foreground_loader(dataset(), 16)), []
        for epoch in epochs:
            order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
            images += [transform(*dataset()[order[i : i + 16]])[0] for i in (0, 16, 32)]
            mixer.end_epoch()
        return images

    want = train(make(Net(), pairing=IndexPairing()), range(4))
    first, second = (make(Net(), pairing=IndexPairing()) for _ in range(2))
    found = train(first, range(2))
    second.load_state_dict(first.state_dict())
    found += train(second, range(2, 4))
    assert all(map(torch.equal, found, want))


def test_a_transform_begins_anew_where_a_state_is_loaded_into_its_mixer() -> None:
    mixer = make(Net(), pairing=IndexPairing())
    transform, (images, labels) = mixer.as_transform(mixer.foreground_loader(dataset(), 16)), dataset().tensors
    state = mixer.state_dict()
    first = transform(images[:16], labels[:16])[0]
    mixer.load_state_dict(state)
    assert torch.equal(transform(images[:16], labels[:16])[0], first)


def test_a_transform_goes_round_foregrounds_that_end() -> None:
    mixer = make(Net(), pairing=IndexPairing())
    images, labels = dataset().tensors
    transform = mixer.as_transform([(images[:16], labels[:16])])
    for _ in range(2):
        for _ in range(3):
            assert len(transform(images[:16], labels[:16])[0]) == 16
        mixer.end_epoch()
    with pytest.raises(UserError, match="gave no batch"):
        mixer.as_transform([])(images[:16], labels[:16])


def test_foregrounds_from_elsewhere_may_be_more_in_every_step() -> None:
    mixer = make(Net(), pairing=IndexPairing())
    images, labels = dataset().tensors
    for background in backgrounds(16):
        mixer(background, (images[:40], labels[:40]))


# ---- a state of other settings


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"epochs": 5}, "had epochs=4, this one has 5;"),
        ({"seed": 3}, "had seed=0, this one has 3;"),
        ({"r": 2.0}, "had r=0.0, this one has 2.0;"),
        ({"world": 2}, "had world=1, this one has 2;"),
        ({"epochs": 5, "seed": 3}, "had epochs=4, this one has 5; it had seed=0, this one has 3;"),
        ({"labels": dataset().tensors[1].flip(0)}, "had other labels, or the same ones in another order;"),
    ],
)
def test_a_state_of_other_settings_is_refused(other: dict[str, object], message: str) -> None:
    given = {"labels": dataset().tensors[1], "epochs": 4, "schedule": MixSchedule()}
    state = OTMixer(Net(), **given).state_dict()  # type: ignore[arg-type]
    mixer = OTMixer(Net(), **given | other)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=re.escape(f"the saved mixer {message} make OTMixer as it was then")):
        mixer.load_state_dict(state | {"epoch": 1})
    assert mixer.epoch == 0


def test_a_state_is_plain_and_stays_as_it_was() -> None:
    mixer, other = (make(Net(), pairing=TransportPairing()) for _ in range(2))
    mixer(*first_and_last())
    mixer.end_epoch()
    saved = io.BytesIO()
    torch.save(mixer.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    counted = state["counts"].clone()
    other.load_state_dict(state)
    other(*first_and_last())
    assert torch.equal(state["counts"], counted)


# ---- what is given


@pytest.mark.parametrize("pairing", [ConfusionPairing(), Curriculum(IndexPairing(), ConfusionPairing())])
def test_confusion_pairing_wants_validation_data(pairing: ConfusionPairing | Curriculum) -> None:
    mixer = make(Net(), pairing=pairing)
    mixer(*first_and_last())
    with pytest.raises(UserError, match=r"call end_epoch\(validation\)"):
        mixer.end_epoch()
    mixer.end_epoch([dataset().tensors])
    assert mixer.confusion is not None
    mixer.end_epoch()  # the matrix of an epoch before will do
    assert mixer.epoch == 2


def test_what_transport_embeds_serves_confusion_pairing_too() -> None:
    mixer = make(Net(), pairing=Curriculum(ConfusionPairing(), TransportPairing()))
    mixer.end_epoch()
    assert mixer.epoch == 1


def test_validation_data_without_a_batch_are_refused() -> None:
    mixer = make(Net(), pairing=TransportPairing())
    mixer(*first_and_last())
    counted = mixer.counter.table.value.clone()
    with pytest.raises(UserError, match="without a batch"):
        mixer.end_epoch([])
    assert mixer.epoch == 0
    assert torch.equal(mixer.counter.table.value, counted)


def test_batches_after_the_last_epoch_stay_plain() -> None:
    mixer = make(Net(), pairing=TransportPairing())
    background, foreground = first_and_last()
    for epoch in range(6):
        mixed = mixer(background, foreground)
        assert bool(mixed.mixed.any()) == (epoch < 4)
        assert torch.equal(mixed.images, background[0]) == (epoch >= 4)
        mixer.end_epoch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2.5}, "a whole number, at least 1, not 2.5"),
        ({"epochs": float("nan")}, "a whole number, at least 1, not nan"),
        ({"labels": [0.0, 1.9, 1.2]}, "class numbers, not torch.float32"),
        ({"rank": 2, "world": 2}, "rank 2 does not exist among 2 processes"),
        ({"rank": -1}, "rank -1 does not exist"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OTMixer(Net(), **{"labels": [0, 1], "epochs": 4} | options)  # type: ignore[arg-type]


def test_what_is_no_saved_state_is_refused() -> None:
    with pytest.raises(UserError, match="it lacks confusion, counts, epoch, step"):
        make(Net()).load_state_dict({})


@pytest.mark.parametrize("form", ["uint8", "int32", "list", "numpy", "with index"])
def test_labels_of_other_kinds_and_longer_batches_are_the_same(form: str) -> None:
    def other(images: torch.Tensor, labels: torch.Tensor) -> tuple[object, ...]:
        if form == "with index":
            return images, labels, torch.arange(len(labels)), {"name": "x"}
        kinds = {"list": labels.tolist(), "numpy": labels.numpy()}
        return images, kinds[form] if form in kinds else labels.to(getattr(torch, form))

    one, two = (make(Net(), pairing=IndexPairing()) for _ in range(2))
    background, foreground = first_and_last()
    want, found = one(background, foreground), two(other(*background), other(*foreground))  # type: ignore[arg-type]
    assert torch.equal(found.images, want.images)
    assert torch.equal(found.target.labels, want.target.labels)
    assert found.target.labels.dtype == torch.int64
    two.end_epoch([other(*background)])  # type: ignore[list-item]


def test_images_of_bytes_are_refused() -> None:
    background, foreground = first_and_last()
    mixer = OTMixer(Net(), dataset().tensors[1], 30.0)  # type: ignore[arg-type]  # a whole number all the same
    mixer(background, foreground)
    with pytest.raises(UserError, match=r"floating-point numbers, not torch\.uint8; convert them first"):
        mixer((background[0].to(torch.uint8), background[1]), foreground)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((16,), 1.5), r"integers, not torch.float32 \(16,\)"),
        (torch.ones(16, 3, dtype=torch.int64), r"a vector \[B\]"),
        (["cat"] * 16, "class numbers, not a list"),
    ],
)
def test_labels_that_are_none_are_refused(labels: object, message: str) -> None:
    background, foreground = first_and_last()
    for pair in (((background[0], labels), foreground), (background, (foreground[0], labels))):
        with pytest.raises(UserError, match=message):
            make(Net())(*pair)  # type: ignore[arg-type]


def test_a_batch_that_is_no_pair_is_refused() -> None:
    background, foreground = first_and_last()
    with pytest.raises(UserError, match=r"not a dict; of a dict take \(batch\['image'\], batch\['label'\]\)"):
        make(Net())({"image": background[0], "label": background[1]}, foreground)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not a Tensor"):
        make(Net())(background, foreground[0])  # type: ignore[arg-type]


# ---- wrong objects


class Half(IndexPairing):
    """A pairing that leaves foregrounds out."""

    def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs:
        return super().__call__(foreground[: len(foreground) // 2], background, embed, context)


class Bare:
    """A pairing that does not say where its foregrounds come from."""

    def __call__(self, *given: object) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "otmix"}, r"pairing must be .* not a str; for example TransportPairing\(\)"),
        ({"pairing": TransportPairing}, r"pairing must be an object, not the class TransportPairing; .* make one"),
        ({"pairing": Curriculum(IndexPairing(), TransportPairing)}, "not the class TransportPairing"),  # type: ignore[arg-type]
        ({"pairing": Bare()}, "pairing must .*, not a Bare"),
        ({"pixels": Mixup}, "pixels must be an object, not the class Mixup"),
        ({"pixels": "mixup"}, r"pixels must .* not a str; for example CutMix\(\)"),
        ({"schedule": 0.5}, r"schedule must .* not a float; for example MixSchedule\(0.5\)"),
        ({"schedule": MixSchedule}, "schedule must be an object, not the class MixSchedule"),
        ({"model": Net}, "model must be an object, not the class Net"),
        ({"model": None}, "model must .* not a NoneType"),
    ],
)
def test_what_is_no_part_of_a_mixer_is_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OTMixer(**{"model": Net(), "labels": [0, 1], "epochs": 4} | options)  # type: ignore[arg-type]


def test_foregrounds_of_another_size_are_refused_even_where_nothing_is_mixed() -> None:
    background, (images, labels) = first_and_last()
    mixer = make(Net(), schedule=MixSchedule(window=(0.5, 1.0)))
    with pytest.raises(UserError, match=r"foreground images are 1 × 8 × 7, the background images 1 × 8 × 8"):
        mixer(background, (images[..., :7], labels))
    assert mixer.step == 0


def test_a_pairing_that_loses_images_is_refused() -> None:
    with pytest.raises(UserError, match="Half gave 8 pairs for 16 foregrounds"):
        make(Net(), pairing=Half())(*first_and_last())


def loader_of(batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(dataset(), batch_size=batch_size)


@pytest.mark.parametrize("pairing", [IndexPairing(), TransportPairing()])
@pytest.mark.parametrize(("batch_size", "epochs"), [(2, [3, 2, 1]), (1, [3, 2]), (8, [3, 2, 1, 0])])
def test_mixed_statistics_are_the_means_over_the_last_epochs_with_mixing(
    pairing: Pairing, batch_size: int, epochs: list[int]
) -> None:
    """Of four epochs with 30, 60 or 8 batches. A batch of one image has statistics, too: it has 64 pixels."""
    torch.manual_seed(0)
    net = Net()
    mixer = make(net, pairing=pairing, schedule=MixSchedule(0.5))
    train(mixer, net, 4, torch.optim.SGD(net.parameters(), 0.1))
    loader = loader_of(batch_size)
    # the pairs depend on F, and on the network as it is, not on the statistics that are being made
    other = make(copy.deepcopy(net), pairing=pairing, schedule=MixSchedule(0.5))
    other.load_state_dict(mixer.state_dict())
    want = means(net, [images for epoch in epochs for images in replayed(other, epoch, loader)])

    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(mixer.state_dict())
    net.train()
    assert mixer.mix_statistics(net, loader, mixer.foreground_loader(dataset(), batch_size))
    torch.testing.assert_close(running(net), want)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"body.1.running_mean", "body.1.running_var"}
    assert net.body[1].momentum == 0.1
    assert net.training
    after = mixer.state_dict()
    assert torch.equal(state["counts"], after["counts"])
    assert [after[name] for name in ("epoch", "step")] == [state[name] for name in ("epoch", "step")] == [4, 0]


def test_mixed_statistics_are_of_epochs_with_mixing() -> None:
    """Where the training ends with plain batches."""
    net = Net()
    mixer = make(net, pairing=IndexPairing(), schedule=MixSchedule(window=(0.0, 0.75)))
    batches = replayed(make(net, pairing=IndexPairing()), 2, loader_of(1))
    batches += replayed(make(net, pairing=IndexPairing()), 1, loader_of(1))
    want = means(net, batches)
    assert mixer.mix_statistics(net, loader_of(1), mixer.foreground_loader(dataset(), 1))
    torch.testing.assert_close(running(net), want)


def test_mixed_statistics_of_a_compiled_network_compile_nothing() -> None:
    net, compiled = Net(), []
    wrapped = torch.compile(net, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    mixer = make(net, pairing=IndexPairing())
    before = running(net)
    assert mixer.mix_statistics(wrapped, loader_of(8), mixer.foreground_loader(dataset(), 8))
    assert not torch.equal(running(net), before)
    assert not compiled


class Keeps(Net):
    """A usual way to give OTMixer the features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.kept = {"features": [nn.functional.dropout(self.body(images), 0.5, self.training)]}
        out: torch.Tensor = self.head(self.kept["features"][0])
        return out


def test_a_model_that_keeps_what_it_made_and_draws_has_mixed_statistics_too() -> None:
    net = Keeps()
    mixer = make(net, pairing=IndexPairing())
    train(mixer, net, 4, torch.optim.SGD(net.parameters(), 0.1))
    kept, state = net.kept["features"][0], torch.get_rng_state()
    assert kept.requires_grad
    before = running(net)
    assert mixer.mix_statistics(net, loader_of(8), mixer.foreground_loader(dataset(), 8))
    assert not torch.equal(running(net), before)
    assert net.kept["features"][0] is kept
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("how", ["in eval mode", "without a trained weight"])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_statistics_stay(how: str, training: bool) -> None:
    """In a model as a whole in eval mode, which layers are is not known: only what is not trained counts."""
    net = Net()
    net.body.append(nn.Unflatten(1, (8, 1, 1))).append(nn.BatchNorm2d(8)).append(nn.Flatten())
    mixer = make(net, pairing=IndexPairing())
    net.train(training)
    frozen = net.body[1]
    if how == "in eval mode":
        frozen.eval()
    else:
        frozen.requires_grad_(False)
    before = running(net)
    assert mixer.mix_statistics(net, loader_of(8), mixer.foreground_loader(dataset(), 8))
    assert torch.equal(running(net), before) == (training or how == "without a trained weight")
    assert net.body[-2].running_mean.abs().sum() > 0  # type: ignore[union-attr,operator]
    assert net.training == training


def test_a_model_that_gives_nan_is_one_sentence() -> None:
    net = Net()
    mixer = make(net, pairing=TransportPairing())
    nn.init.constant_(net.body[0].weight, 3e38)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="features or logits are not finite numbers at step 0 of epoch 0"):
        mixer(*first_and_last())


@pytest.mark.parametrize("why", ["nothing was mixed", "not finite"])
def test_statistics_that_are_no_good_are_not_taken(why: str) -> None:
    net = Net()
    finite = why == "nothing was mixed"
    if not finite:
        nn.init.constant_(net.body[0].weight, 3e38)  # type: ignore[arg-type]
    mixer = make(net, pairing=IndexPairing(), schedule=MixSchedule(1e-9 if finite else 1.0))
    before = running(net)
    assert not mixer.mix_statistics(net, loader_of(8), mixer.foreground_loader(dataset(), 8))
    assert torch.equal(running(net), before)
    assert mixer.epoch == 0


def test_a_model_without_statistics_or_a_loader_without_a_batch_is_refused() -> None:
    net = Net()
    mixer = make(net)
    foregrounds = mixer.foreground_loader(dataset(), 8)
    for model in (net.head, nn.BatchNorm2d(3, track_running_stats=False), lambda images: (images, images)):
        with pytest.raises(UserError, match="has none; give it the network that you train, or leave it out"):
            mixer.mix_statistics(model, loader_of(8), foregrounds)  # type: ignore[arg-type]
    before = running(net)
    with pytest.raises(UserError, match="without a batch; give that of the training"):
        mixer.mix_statistics(net, [], foregrounds)
    assert torch.equal(running(net), before)
    assert (mixer.epoch, mixer.step) == (0, 0)
