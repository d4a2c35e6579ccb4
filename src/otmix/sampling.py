"""Which images are drawn as backgrounds and which as foregrounds: eq. 2 and 3 of Gao et al. 2023.

Both streams yield `Items`; no pixel is read. Sizes are global: a batch is drawn once, from a generator that does not
know the rank, and process r of w takes the positions r, r + w, r + 2w, … of it. So the data that a step sees do not
depend on the number of processes. Pairings that search look at the whole batch (`BatchMixer`); each process mixes its
own part of it, with its own λ and box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Sampler

from otmix.errors import UserError
from otmix.randomness import Moment
from otmix.types import ClassCounts, Items


def _check_counts(counts: ClassCounts) -> None:
    if not isinstance(counts, ClassCounts):
        raise UserError(
            f"the law of the classes is made from ClassCounts, not from a {type(counts).__name__}; give "
            "ClassCounts.from_labels(labels), or ClassCounts of how many images each class has"
        )


def inverse_frequency(counts: ClassCounts, r: float = 1.0) -> Tensor:
    """Class probabilities q_k = n_k^-r / Σ_l n_l^-r, float64 `[K]` (Gao et al. 2023, eq. 3).

    r = 1 is the inverse class frequency, r = 1/2 its smoothed form, r = 0 uniform over classes, r = −1 the natural
    frequencies. The exponent is per *class*: one image of class k has weight q_k / n_k. (The released code's
    `weighted_alpha` is an exponent per image: its 1 is r = 0 here.)
    """
    _check_counts(counts)
    if not math.isfinite(r):
        raise UserError(f"the exponent r of the foreground classes must be a finite number, it is {r}")
    return torch.softmax(-r * counts.counts.double().log(), dim=0)


def effective_number(counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    """Class probabilities q_k ∝ (1 − β) / (1 − β^n_k), float64 `[K]`, summing to 1.

    By the effective number of samples (Cui et al. 2019), the other choice that eq. 3 names. β = 0 is uniform over
    classes; β → 1 tends to `inverse_frequency(counts, r=1)`. Times K these are the class weights that sum to K.
    """
    _check_counts(counts)
    if not 0.0 <= beta < 1.0:
        limit = "for its limit 1 use the inverse frequency with r = 1"
        raise UserError(f"beta of the effective number must lie in [0, 1), it is {beta}; {limit}")
    # 1 − β^n = −expm1(n ln β): the difference of two nearly equal numbers is never formed
    log_beta = math.log(beta) if beta > 0.0 else -math.inf
    weight = 1.0 / -torch.expm1(counts.counts.double() * log_beta)
    return weight / weight.sum()


def _as_labels(labels: Tensor | Sequence[int]) -> Tensor:
    labels = torch.as_tensor(labels, device="cpu")
    if labels.ndim != 1 or labels.numel() == 0:
        raise UserError(f"labels must be a vector [N] with N >= 1, not of shape {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise UserError(f"labels must be class numbers, integers, not {labels.dtype}")
    return labels.to(torch.int64)


def check_place(rank: int, world: int) -> None:
    """Raises UserError for a rank that does not exist."""
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} does not exist among {world} processes; ranks count from 0")


def _uniform_below(u: Tensor, n: Tensor) -> Tensor:
    """Integers in 0 … n−1 from uniforms `u` in [0, 1), float64."""
    # the minimum keeps inside what rounds up to n
    return torch.minimum((u * n).long(), n - 1)


@dataclass(frozen=True)
class ClassSampling:
    """A law of the background stream's classes other than the natural one: q_k ~ n_k^power, from `start` on.

    Class-balanced sampling is power 0 and start 0; square-root sampling (Mahajan et al. 2018) power 1/2; deferred
    re-sampling (DRS, Cao et al. 2019) power 0 from 160 of 240 epochs. Before `start`, and with power 1, each epoch is a
    permutation of the images as in eq. 2. Stateless: a function of the progress. Raises UserError for a start outside
    [0, 1] or a power that is not finite.

    Args:
        power: of the class frequency; 0 draws all classes evenly, 1/2 is square-root sampling (DRS in M2m's
            code: 0; others go by effective numbers, which is nearly the same up to some thousand images a class).
        start: share of the run from which the law holds; of DRS by --schedule: 160 of 240 epochs, 160 of 200 with ldam
            and bbn, 80 of 200 with imagenet-lt, 160 of 210 with inaturalist (DRS in M2m's code: 160 of 200).
    """

    counts: ClassCounts
    power: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= 1.0:
            raise UserError(f"the start of re-sampling is a share of the run, in [0, 1]; it is {self.start}")
        if not math.isfinite(self.power):
            raise UserError(f"the power of re-sampling must be a finite number, it is {self.power}")

    def class_probability(self, progress: float) -> Tensor | None:
        """float64 `[K]`, or None while the natural law holds."""
        natural = self.power == 1.0 or progress < self.start
        return None if natural else inverse_frequency(self.counts, -self.power)


class BackgroundStream:
    """Eq. 2: every image with weight 1/N, as a fresh permutation of all images in each epoch.

    With a `law`, in the epochs for which it has class probabilities, B images are drawn for each batch instead, classes
    by these, with replacement.

    `labels [N]`; `batch_size` B is global, over all `world` processes. An epoch has ceil(N/B) batches; the last may be
    smaller. A batch that does not divide by `world` is padded by repeating its first images, so that all processes have
    equally many. So one process sees every image exactly once an epoch, several together at least once.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        batch_size: int,
        world: int = 1,
        law: Callable[[float], Tensor | None] | None = None,
    ) -> None:
        if batch_size < 1 or world < 1:
            raise UserError(f"batch size and number of processes must be at least 1, they are {batch_size} and {world}")
        self.labels = _as_labels(labels)
        self.batch_size = batch_size
        self.world = world
        self.law = law

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def epoch(self, moment: Moment) -> list[Items]:
        """The batches of process `moment.rank` in order; the moment's seed, stage and epoch decide, not its step."""
        check_place(moment.rank, self.world)
        draw = moment.at_epoch().generator("background")
        probability = None if self.law is None else self.law(moment.progress)
        if probability is None:
            order = torch.randperm(len(self.labels), generator=draw)
        else:
            drawn = ForegroundStream(self.labels, probability).draw(len(self.labels), draw).index
            assert drawn is not None  # a ForegroundStream always knows the place
            order = drawn
        batches = []
        for batch in torch.split(order, self.batch_size):
            padded = math.ceil(len(batch) / self.world) * self.world
            # positions past the end begin again at the first
            index = batch[torch.arange(moment.rank, padded, self.world) % len(batch)]
            batches.append(Items(self.labels[index], index))
        return batches


class ForegroundStream:
    """Eq. 3: first a class from `class_probability`, then one of its images uniformly, with replacement.

    So image j of class k has weight w_j = q_k / n_k. `labels [N]`; `class_probability [K]` non-negative, in any scale
    (`inverse_frequency`, `effective_number`, or one's own). Raises UserError where a class that can be drawn is empty.
    """

    def __init__(self, labels: Tensor | Sequence[int], class_probability: Tensor, world: int = 1) -> None:
        labels = _as_labels(labels)
        probability = torch.as_tensor(class_probability, dtype=torch.float64, device="cpu")
        if world < 1:
            raise UserError(f"the number of processes must be at least 1, it is {world}")
        usable = torch.isfinite(probability) & (probability >= 0)
        if probability.ndim != 1 or not bool(usable.all()) or not bool(probability.any()):
            raise UserError("class probabilities must be a vector [K] of finite numbers, none negative, not all zero")
        classes = len(probability)
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            seen = f"{int(labels.min())} to {int(labels.max())}"
            raise UserError(f"labels run from {seen}, but the class probabilities are for classes 0 to {classes - 1}")
        self._counts = torch.bincount(labels, minlength=classes)
        empty = torch.nonzero((self._counts == 0) & (probability > 0)).flatten().tolist()
        if empty:
            raise UserError(f"classes {empty} have no image to draw; give each at least one, or the probability 0")
        self.world = world
        self._order = torch.argsort(labels, stable=True)
        self._first = self._counts.cumsum(0) - self._counts
        cumulative = probability.cumsum(0)
        # ends at exactly 1, so a uniform in [0, 1) always falls below it and never into a class of probability 0
        self._cumulative = cumulative / cumulative[-1]

    def draw(self, n: int, generator: torch.Generator) -> Items:
        """`n` independent draws."""
        u = torch.rand(2, n, generator=generator, dtype=torch.float64)
        classes = torch.searchsorted(self._cumulative, u[0], right=True)
        return Items(classes, self._order[self._first[classes] + _uniform_below(u[1], self._counts[classes])])

    def step(self, n: int, moment: Moment) -> Items:
        """`n` items for process `moment.rank` at one step: its share of n · world that are drawn for all together."""
        check_place(moment.rank, self.world)
        return self.draw(n * self.world, replace(moment, rank=0).generator("foreground"))[moment.rank :: self.world]


class ForegroundSampler(Sampler[int]):
    """Eq. 3 as a torch sampler, for a `DataLoader` of one's own: indices of images, with q_k ∝ n_k^-r.

    `num_samples` is the length of an epoch over all processes (default: the number of images), rounded up to a multiple
    of `world`. The draws are a function of `seed`, the epoch and the rank alone: call `set_epoch` before each epoch,
    else every epoch repeats the same draws. With several processes give each its `rank` and their number `world`.
    Workers need nothing: indices are drawn in the main process.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        num_samples: int | None = None,
        *,
        r: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_place(rank, world)
        labels = _as_labels(labels)
        if num_samples is not None and num_samples < 1:
            raise UserError(f"the number of foregrounds in an epoch must be at least 1, it is {num_samples}")
        self._stream = ForegroundStream(labels, inverse_frequency(ClassCounts.from_labels(labels), r), world)
        self._length = math.ceil((len(labels) if num_samples is None else num_samples) / world)
        self._moment = Moment(seed=seed, rank=rank)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration draws."""
        self._moment = replace(self._moment, epoch=epoch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        items = self._stream.step(self._length, self._moment)
        assert items.index is not None  # a ForegroundStream always knows the place
        yield from items.index.tolist()
