"""OTmix in a training loop of one's own: any model, any dataset of `(image, label)`, any loss with reduction='none'."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from otmix.confusion import STREAM_DECAY, ConfusionCounter
from otmix.devices import move
from otmix.errors import UserError
from otmix.mixer import BatchMixer, MixSchedule
from otmix.mixing import CutMix, Mixer
from otmix.models import embed
from otmix.models.batchnorm import STATISTICS_STEPS, MeanStatistics
from otmix.own_loop.batches import LabelledImages, again_and_again, batch_of, labelled
from otmix.own_loop.foregrounds import ForegroundLoader, ForegroundSteps
from otmix.own_loop.parts import check_batch_norm, check_model, check_pairing, check_pixels, check_schedule
from otmix.pairing import (
    ConfusionPairing,
    Curriculum,
    IndexPairing,
    Pairing,
    PairingContext,
    TransportPairing,
    WithinBatchPairing,
)
from otmix.protocols import PROTOCOLS
from otmix.randomness import Moment
from otmix.sampling import ForegroundStream, check_place, inverse_frequency
from otmix.transport import NotFinite
from otmix.types import ClassCounts, Confusion, ConfusionOrigin, Embedded, Items, Mixed

CLEAN = PROTOCOLS["clean"]


class OTMixer:
    """Pairs rare-class foregrounds with backgrounds by optimal transport and mixes them (Gao et al. 2023, Algorithm 1).

        mixer = OTMixer(features_and_logits, labels, epochs=30)
        foreground_loader = mixer.foreground_loader(dataset, batch_size=128)
        for epoch in range(mixer.epoch, 30):
            for background, foreground in zip(loader, foreground_loader):
                mixed = mixer(background, foreground)
                loss = mixed.loss(criterion, model(mixed.images))      # criterion(…, reduction="none")
                …
            mixer.end_epoch()

    Args:
        model: a module that returns an `Output`, or a function `images -> (features [B,D], logits [B,K])`. It is looked
            at in eval mode, without gradient, and left as it was.
        labels: `[N]`, the labels of the training set, in the order of its indices.
        epochs: how many there will be; transport replaces random pairing with probability (t/T) in epoch t of T. The
            first epoch and, of 10 or more, the last are not mixed (`schedule`; of many, the first 1.7 % and the last
            1.3 %), nor is what comes after the last.
        pairing, pixels, schedule: other rules than the defaults, which are the library's `clean` protocol.
            ConfusionPairing wants `end_epoch(validation)`, and pairs at random before the first.
        r: exponent of the foreground classes, q_k ~ n_k^-r (eq. 3).
        rank, world: the place of this process among several. Each mixes its own part of a batch: it solves transport
            for that alone, and draws its own λ and box. Where torch.distributed is initialised, `end_epoch` adds
            up what all of them have seen, so all call it; else each has a confusion matrix of its own.

    Images may be normalised; only SaliencyMix wants them in [0, 1]. The mixer may be called inside autocast or outside:
    it looks at the model in the precision of the moment, and solves transport in float32. Of a network in
    DistributedDataParallel give the inner one (`ddp.module`), or a function that calls it.

    Raises UserError when labels and settings do not fit.
    """

    def __init__(
        self,
        model: Callable[[Tensor], object],
        labels: Sequence[int] | Tensor,
        epochs: int,
        *,
        pairing: Pairing | None = None,
        pixels: Mixer | None = None,
        schedule: MixSchedule | None = None,
        r: float = CLEAN.foreground_r,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not epochs >= 1 or epochs % 1:
            raise UserError(
                f"OTMixer needs the number of epochs of the whole training, a whole number, at least 1, not {epochs}"
            )
        check_place(rank, world)
        pairing = Curriculum(IndexPairing(), TransportPairing()) if pairing is None else pairing
        pixels = CutMix(CLEAN.alpha, CLEAN.box, CLEAN.box_per) if pixels is None else pixels
        if schedule is None:
            schedule = MixSchedule(CLEAN.mix_probability, (CLEAN.mix_from, CLEAN.mix_until), CLEAN.mix_fraction)
        check_model(model)
        check_pairing(pairing)
        check_pixels(pixels)
        check_schedule(schedule)
        self.model = model
        labels = torch.as_tensor(labels)
        self.counts = ClassCounts.from_labels(labels)
        self.labels = labels.to(torch.int64)
        self.epochs, self.seed, self.r, self.rank, self.world = int(epochs), seed, r, rank, world
        self.stream = ForegroundStream(self.labels, inverse_frequency(self.counts, r), world)
        self.batch_mixer = BatchMixer(pairing, pixels, schedule)
        if not schedule.reaches(self.epochs):
            raise UserError(
                f"OTMixer would mix nothing: none of {self.epochs} epochs begins within the window {schedule.window} "
                "of the training; give more epochs, or schedule=MixSchedule(0.5)"
            )
        self.epoch, self.step = 0, 0
        self.entries = 0  # how often it has come to an epoch, by end_epoch or a state: foregrounds begin anew there
        self.confusion: Confusion | None = None
        self.counter = ConfusionCounter(self.counts.num_classes, ConfusionOrigin(), decay=STREAM_DECAY)

    @property
    def moment(self) -> Moment:
        """Where in the training the next call is."""
        return Moment(self.seed, 0, min(self.epoch, self.epochs - 1), self.epochs, self.step, self.rank)

    def __call__(self, background: LabelledImages, foreground: LabelledImages) -> Mixed:
        """Mix two batches `(images [B,C,H,W], labels [B], …)`. The foreground is moved to the background's device, and
        cut to its length, as the last batch of an epoch may be short.

        Where the schedule leaves a batch alone, the background comes back as it was. Raises UserError for labels on the
        CPU that are out of range, for fewer foregrounds than backgrounds or ones of another size, for a pairing that
        leaves some out, for what is no such batch, and (on a CPU) for a model that gives NaN or infinity to transport.
        """
        mixed = self._mixed(background, foreground, self.counter)
        self.step += 1
        return mixed

    def _mixed(self, background: LabelledImages, foreground: LabelledImages, counter: ConfusionCounter | None) -> Mixed:
        background, foreground = labelled(background), labelled(foreground)
        device = background[0].device
        for _, labels in (background, foreground):
            self._check(labels)
        back = batch_of(background, device)
        fore = batch_of(foreground, device)[: len(back)]
        if len(fore) < len(back):
            raise UserError(
                f"the foreground batch has {len(fore)} images, the background {len(back)}, so some of these would be "
                f"lost; make the foreground_loader with batch_size={len(back)}"
            )
        if fore.images.shape[1:] != back.images.shape[1:]:
            of_fore, of_back = (" × ".join(map(str, batch.images.shape[1:])) for batch in (fore, back))
            raise UserError(
                f"the foreground images are {of_fore}, the background images {of_back}; give both the same transforms"
            )
        if self.counter.table.device != device:
            self._move(device)
        images = {id(back.items): back.images, id(fore.items): fore.images}

        def look(items: Items) -> Embedded:
            return embed(self.model, images[id(items)], items, log_probabilities=items is back.items)

        context = PairingContext(self.moment, self.confusion)
        over = self.epoch >= self.epochs
        if over:
            return Mixed.unmixed(back)
        try:
            return self.batch_mixer(back, fore, look, context, counter)
        except NotFinite as error:
            raise UserError(
                f"the model's features or logits are not finite numbers at step {self.step} of epoch {self.epoch} "
                "(both counted from 0); try a lower learning rate, or float32"
            ) from error

    def end_epoch(self, validation: Iterable[LabelledImages] | None = None) -> None:
        """Call after each epoch: estimates the confusion matrix for the next one, and moves on.

        From what the epoch's backgrounds showed, or, if given, from a pass over `validation`, batches of images that
        are not trained on; they are moved to where the training batches are. Of several processes each may pass all
        of them or its part. Raises UserError where `validation` has no batch, and where the pairing needs a matrix that
        only it can give.
        """
        counter = self.counter
        together = self._together()
        if validation is None:
            if self.confusion is None and _never_embeds(self.batch_mixer.pairing):
                raise UserError(
                    "ConfusionPairing needs a confusion matrix, and embeds nothing that it could come from; call "
                    "end_epoch(validation) with batches of images that are not trained on"
                )
        else:
            device, origin = counter.table.device, ConfusionOrigin("validation", "all", None, soft=False)
            counter = ConfusionCounter(self.counts.num_classes, origin, device=device)
            batch = None
            for pair in map(labelled, validation):
                self._check(pair[1])
                batch = batch_of(pair, device)
                seen = embed(self.model, batch.images, batch.items)
                assert seen.log_probabilities is not None
                counter.add(batch.items.labels, seen.log_probabilities)
            if batch is None and not together:  # the part of one of several processes may be empty
                raise UserError("end_epoch was given validation data without a batch; give a loader that has some")
            self.counter.table.scale(self.counter.decay)  # what was streamed meanwhile fades, as it would have
        estimate = counter.estimate(_over_all_processes if together else None)
        if estimate is not None:
            self.confusion = replace(estimate, matrix=estimate.matrix.to(self.counter.table.device))
        self._enter(self.epoch + 1, 0)

    def mix_statistics(self, model: nn.Module, loader: Iterable[LabelledImages], foregrounds: Iterable[Any]) -> bool:
        """After the training: make the running statistics of the model's BatchNorm layers their means over the batches
        of the last epoch with mixing, mixed or not, with its weights as they are; of more epochs, where these have
        fewer than 64 batches. `clean` ends so with plain cross-entropy, where an epoch has as many (`bn_statistics`).

        Half of the batches are mixed, and the statistics of training are those of whatever came last. What this is
        worth hangs on the loss and the data (results/README.md), so compare on images that are not trained on;
        a `copy.deepcopy(model)` keeps the model as it was.

        `model` is the network that is trained, `loader` and `foregrounds` are those of the loop; the batches go to the
        model's device. Call it inside autocast if you train so. Of several processes all call it. Frozen layers keep
        what they have: in eval mode where the model is in train mode, or with a weight that is not trained. The mixer
        and the random numbers stay as they are, and transport goes by the model as it is. False, and nothing is
        changed, where no batch was mixed or a mean is not a finite number. Raises UserError for a model without such
        layers, and for a loader without a batch.
        """
        model = check_batch_norm(model)
        device = next(model.parameters()).device
        statistics, any_mixed, place = MeanStatistics(model), torch.zeros((), device=device), (self.epoch, self.step)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws, too
            try:
                for mixed in self._last_mixes(loader, foregrounds, device):
                    statistics.see(mixed.images)
                    any_mixed += mixed.pairs is not None
            finally:
                self._enter(*place)
        if self._together():
            any_mixed = _over_all_processes(any_mixed)
        return bool(any_mixed) and statistics.adopt(_mean_of_all_processes if self._together() else None)

    def _last_mixes(
        self, loader: Iterable[LabelledImages], foregrounds: Iterable[Any], device: torch.device
    ) -> Iterator[Mixed]:
        """The batches of the last epochs with mixing, of as many as hold `STATISTICS_STEPS`; the last comes first."""
        steps = 0
        for epoch in reversed(self.batch_mixer.schedule.last_epochs(self.epochs, self.epochs)):
            self._enter(epoch, 0)
            for background, foreground in zip(loader, foregrounds):
                images, labels = labelled(background)
                yield self._mixed((move(images, device), labels), foreground, None)
                self.step += 1
            if not self.step:
                raise UserError("mix_statistics was given a loader without a batch; give that of the training")
            steps += self.step
            if steps >= STATISTICS_STEPS:
                return

    def foreground_loader(self, dataset: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
        """A `DataLoader` of foregrounds (eq. 3); `options` go to it (num_workers, collate_fn, …). `batch_size` is that
        of the backgrounds' loader, for one process.

        It has no end and no length: in `zip(loader, foreground_loader)` the backgrounds decide how long an epoch is.
        What it draws follows the mixer: it begins at the epoch and step where that is, so a resumed mixer resumes it.
        Raises UserError for a dataset that has not one image for each label that OTMixer was given; with the batch that
        shows it, for one in another order than the labels; and, when a pass begins, where `end_epoch` was not called
        after the pass before.
        """
        if isinstance(dataset, Sized) and len(dataset) != len(self.labels):
            raise UserError(
                f"the foreground dataset has {len(dataset)} images, but OTMixer was given {len(self.labels)} labels; "
                "give both of the same images, in the same order"
            )
        return ForegroundLoader(dataset, batch_size=batch_size, sampler=ForegroundSteps(self, batch_size), **options)

    def as_transform(self, foregrounds: Iterable[LabelledImages]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A batch transform in torchvision's manner: `(images, labels) -> (images, soft labels [B,K])`. It begins
        `foregrounds` anew in each epoch, as `zip` does, and goes round where they end before it.
        """
        entry = -1
        batches: Iterator[LabelledImages] = iter(())

        def transform(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal entry, batches
            if entry != self.entries:
                entry, batches = self.entries, again_and_again(foregrounds)
            mixed = self((images, labels), next(batches))
            return mixed.images, mixed.soft_labels(self.counts.num_classes)

        return transform

    def state_dict(self) -> dict[str, Any]:
        """Everything that resumes the mixer (of several processes: of this one), as tensors and plain values.

        Taken within an epoch, it resumes at the next step, the foreground_loader too, if all of its batches went to the
        mixer; your loader must then go on at that batch as well.
        """
        confusion = self.confusion
        return {
            "epoch": self.epoch,
            "step": self.step,
            "confusion": None
            if confusion is None
            else {"matrix": confusion.matrix, "origin": vars(confusion.origin).copy()},
            "counts": self.counter.table.value.clone(),
            "training": self._training(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same labels, epochs, seed, r and number of processes. Raises
        UserError for others, and for what is no such state.
        """
        if missing := {"epoch", "step", "confusion", "counts", "training"} - state.keys():
            raise UserError(
                f"this is no state of an OTMixer, it lacks {', '.join(sorted(missing))}; give what state_dict() gave"
            )
        if state["counts"].shape[0] != self.counts.num_classes:
            raise UserError(
                f"the saved mixer knew {state['counts'].shape[0]} classes, this one knows {self.counts.num_classes}; "
                "use the same labels"
            )
        saved, own = state["training"], self._training()
        if others := [name for name in own if saved.get(name) != own[name]]:
            raise UserError(
                "the saved mixer had "
                + "; it had ".join(
                    "other labels, or the same ones in another order"
                    if name == "labels"
                    else f"{name}={saved.get(name)}, this one has {own[name]}"
                    for name in others
                )
                + "; make OTMixer as it was then"
            )
        self._enter(state["epoch"], state["step"])
        self.counter.table.value = state["counts"]
        confusion = state["confusion"]
        self.confusion = (
            None
            if confusion is None
            else Confusion(confusion["matrix"].to(self.counter.table.device), ConfusionOrigin(**confusion["origin"]))
        )

    def _training(self) -> dict[str, Any]:
        """What decides the draws, as plain values. Not the rank: a state of the first process may serve all."""
        labels = hashlib.blake2b(self.labels.cpu().numpy().tobytes(), digest_size=8).hexdigest()
        return {
            "labels": labels,
            "epochs": self.epochs,
            "seed": int(self.seed),
            "r": float(self.r),
            "world": int(self.world),
        }

    def _together(self) -> bool:
        """Whether there are other processes that can be asked."""
        return self.world > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()

    def _enter(self, epoch: int, step: int) -> None:
        self.epoch, self.step, self.entries = epoch, step, self.entries + 1

    def _check(self, labels: Tensor) -> None:
        """Raises UserError for a label out of range. Those on a GPU are not looked at: that would wait for it."""
        if labels.device.type != "cpu":
            return
        k = self.counts.num_classes
        if len(wrong := labels[(labels < 0) | (labels >= k)]):
            raise UserError(
                f"label {wrong[0].item()} is out of range: OTMixer was given the labels of {k} classes; give batches "
                f"with labels 0 … {k - 1}"
            )

    def _move(self, device: torch.device) -> None:
        counts = self.counter.table.value
        self.counter = ConfusionCounter(
            self.counts.num_classes, self.counter.origin, decay=self.counter.decay, device=device
        )
        self.counter.table.value = counts
        if self.confusion is not None:
            self.confusion = replace(self.confusion, matrix=self.confusion.matrix.to(device))


def _never_embeds(pairing: Pairing) -> bool:
    """Whether it wants a confusion matrix and looks at nothing from which one could be streamed."""
    parts = (pairing.first, pairing.then) if isinstance(pairing, Curriculum) else (pairing,)
    blind = all(isinstance(part, (ConfusionPairing, IndexPairing, WithinBatchPairing)) for part in parts)
    return blind and any(isinstance(part, ConfusionPairing) for part in parts)


def _over_all_processes(counts: Tensor) -> Tensor:
    torch.distributed.all_reduce(counts)
    return counts


def _mean_of_all_processes(value: Tensor) -> Tensor:
    return _over_all_processes(value) / torch.distributed.get_world_size()
