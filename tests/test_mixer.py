"""When a batch is mixed, and that the way from two batches to a mix keeps images, labels and shares together."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from otmix.confusion import ConfusionCounter
from otmix.errors import UserError
from otmix.mixer import BatchMixer, MixSchedule
from otmix.mixing import CutMix, Mixup
from otmix.pairing import (
    ConfusionPairing,
    Curriculum,
    IndexPairing,
    Pairing,
    PairingContext,
    TransportPairing,
    WithinBatchPairing,
)
from otmix.randomness import Moment
from otmix.types import Batch, Confusion, ConfusionOrigin, Embed, Embedded, Items, Mixed

K = 5


def batch(n: int, seed: int) -> Batch:
    """Each image is constant, its value 10 · label + place / 100 + seed: a pixel tells where it came from."""
    labels = torch.randint(K, (n,), generator=torch.Generator().manual_seed(seed))
    values = 10.0 * labels + torch.arange(n) / 100 + 100 * seed
    return Batch(Items(labels), values[:, None, None, None].expand(n, 1, 8, 8).clone())


def look(items: Items) -> Embedded:
    n = len(items)
    g = torch.Generator().manual_seed(n)
    return Embedded(items, torch.randn(n, 4, generator=g), torch.full((n, K), 1 / K).log())


@pytest.mark.parametrize("pairing", [IndexPairing(), TransportPairing(), WithinBatchPairing()])
def test_pixels_labels_and_shares_stay_together(pairing: IndexPairing | TransportPairing | WithinBatchPairing) -> None:
    back, fore = batch(12, 1), batch(12, 2)
    mixed = BatchMixer(pairing, CutMix())(back, fore, look, PairingContext(Moment()))
    assert mixed.pairs is not None
    source = fore if pairing.from_foregrounds else back
    for i in range(12):
        f, b = int(mixed.pairs.foreground[i]), int(mixed.pairs.background[i])
        pixels = mixed.images[i].flatten()
        from_back = (pixels == back.images[b, 0, 0, 0]).float().mean()
        assert float(from_back) == pytest.approx(float(mixed.image_share[i]))
        assert set(pixels.tolist()) <= {float(back.images[b, 0, 0, 0]), float(source.images[f, 0, 0, 0])}
        assert mixed.target.labels[i].tolist() == [int(back.items.labels[b]), int(source.items.labels[f])]
        assert mixed.target.shares[i].tolist() == pytest.approx([float(from_back), 1 - float(from_back)])


def test_an_unmixed_batch_is_the_background_batch() -> None:
    back = batch(6, 1)
    mixed = BatchMixer(IndexPairing(), CutMix(), MixSchedule(probability=0.0))(
        back, None, look, PairingContext(Moment())
    )
    assert mixed.images is back.images
    assert mixed.target.labels.tolist() == back.items.labels[:, None].tolist()
    assert not mixed.mixed.any()
    assert mixed.pairs is None


class Processes:
    """As many threads, which put their rows together as processes of a run do."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.meeting = threading.Barrier(world, timeout=20)
        self.rows: dict[int, Tensor] = {}

    def gather_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gather(rows: Tensor) -> Tensor:
            self.rows[rank] = rows
            self.meeting.wait()
            whole = torch.stack([self.rows[r] for r in range(self.world)], dim=1).flatten(0, 1)
            self.meeting.wait()
            return whole

        return gather

    def run(self, work: Callable[[int], Mixed]) -> list[Mixed]:
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(work, range(self.world)))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "pairing",
    [
        TransportPairing(),
        TransportPairing(select="sample"),
        ConfusionPairing(),
        Curriculum(IndexPairing(), TransportPairing(), power=0.0),
    ],
)
def test_several_processes_pair_the_whole_batch(pairing: Pairing, world: int) -> None:
    """As one process does; each mixes its own foregrounds, and looks at its own images only."""
    back, fore = batch(12, 1), batch(12, 2)
    every = {id(b): torch.randn(12, 4, generator=torch.Generator().manual_seed(s)) for s, b in enumerate((back, fore))}
    confusion = Confusion(torch.rand(K, K, generator=torch.Generator().manual_seed(5)).softmax(1), ConfusionOrigin())
    moment = Moment(step=3)

    def embed_part(parts: dict[int, tuple[Batch, slice]]) -> Embed:
        def embed(items: Items) -> Embedded:
            whole, place = parts[id(items)]
            features = every[id(whole)][place]
            return Embedded(items, features, features.log_softmax(1).repeat(1, 2)[:, :K].log_softmax(1))

        return embed

    everything = slice(None)
    one = BatchMixer(pairing, Mixup())(
        back,
        fore,
        embed_part({id(back.items): (back, everything), id(fore.items): (fore, everything)}),
        PairingContext(moment, confusion),
    )
    assert one.pairs is not None
    processes = Processes(world)

    def work(rank: int) -> Mixed:
        place = slice(rank, None, world)
        own_back, own_fore = back[place], fore[place]
        mixer = BatchMixer(pairing, Mixup(), MixSchedule(fraction=0.5))
        embed = embed_part({id(own_back.items): (back, place), id(own_fore.items): (fore, place)})
        context = PairingContext(replace(moment, rank=rank), confusion)
        return mixer(own_back, own_fore, embed, context, gather=processes.gather_of(rank))

    for rank, mixed in enumerate(processes.run(work)):
        place = slice(rank, None, world)
        assert mixed.pairs is not None
        assert mixed.pairs.by == one.pairs.by
        assert mixed.pairs.foreground.tolist() == list(range(12 // world))
        assert torch.equal(mixed.pairs.background, one.pairs.background[place])
        chosen, own = back[one.pairs.background[place]], fore[place]
        for i in range(12 // world):
            if not mixed.mixed[i]:  # a plain background of its own
                assert torch.equal(mixed.images[i], back[place].images[i])
                continue
            share = mixed.image_share[i]
            torch.testing.assert_close(mixed.images[i], share * chosen.images[i] + (1 - share) * own.images[i])
            assert mixed.target.labels[i].tolist() == [int(chosen.items.labels[i]), int(own.items.labels[i])]
        assert int(mixed.mixed.sum()) == 6 // world


def test_pairings_that_do_not_search_ask_no_other_process() -> None:
    def never(rows: Tensor) -> Tensor:
        raise AssertionError("there is nobody to ask")

    for pairing in (IndexPairing(), WithinBatchPairing()):
        BatchMixer(pairing, CutMix())(batch(4, 1), batch(4, 2), look, PairingContext(Moment()), gather=never)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25, 0.125])
def test_fraction_is_the_share_of_images_within_a_mixed_batch(fraction: float) -> None:
    """Table 7: the other images are plain backgrounds, at their own places."""
    back, fore = batch(16, 1), batch(16, 2)
    mixed = BatchMixer(TransportPairing(), CutMix(), MixSchedule(fraction=fraction))(
        back, fore, look, PairingContext(Moment(step=3))
    )
    assert int(mixed.mixed.sum()) == round(16 * fraction)
    rest = ~mixed.mixed
    assert torch.equal(mixed.images[rest], back.images[rest])
    assert torch.equal(mixed.soft_labels(K)[rest], torch.nn.functional.one_hot(back.items.labels[rest], K).float())


def test_more_foregrounds_than_backgrounds() -> None:
    """Those that stay plain are backgrounds all the same, the first ones again where there are too few."""
    back, fore = batch(4, 1), batch(6, 2)
    mixer = BatchMixer(TransportPairing(), CutMix(), MixSchedule(fraction=0.5))
    for step in range(5):
        mixed = mixer(back, fore, look, PairingContext(Moment(step=step)))
        assert int(mixed.mixed.sum()) == 3
        for i in torch.nonzero(~mixed.mixed).flatten().tolist():
            assert torch.equal(mixed.images[i], back.images[i % 4])
            assert mixed.target.labels[i].tolist() == [int(back.items.labels[i % 4])] * 2


def test_a_curriculum_from_the_batch_itself_to_a_second_stream() -> None:
    """CutMix first, then OTmix: each takes its foregrounds from where it wants them."""
    back, fore = batch(8, 1), batch(8, 2)
    mixer = BatchMixer(Curriculum(WithinBatchPairing(), TransportPairing(), power=1.0), Mixup())
    seen = set()
    for step in range(30):
        moment = Moment(epoch=4, epochs=10, step=step)
        mixed = mixer(back, fore, look, PairingContext(moment))
        assert mixed.pairs is not None
        source = back if mixed.pairs.by == "within-batch" else fore
        assert mixer.needs_foreground(moment) == (source is fore)
        assert torch.equal(mixed.target.labels[:, 1], source.items.labels[mixed.pairs.foreground])
        share = mixed.image_share[:, None, None, None]
        expected = share * back.images[mixed.pairs.background] + (1 - share) * source.images[mixed.pairs.foreground]
        torch.testing.assert_close(mixed.images, expected)
        seen.add(mixed.pairs.by)
    assert seen == {"within-batch", "transport"}


@pytest.mark.parametrize(
    ("epochs", "mixed"),
    [(240, range(4, 237)), (120, range(2, 119)), (30, range(1, 29)), (10, range(1, 9)), (9, range(1, 9))],
)
def test_the_last_epoch_is_plain_in_short_runs_too(epochs: int, mixed: range) -> None:
    released, always = MixSchedule(window=(4 / 240, 237 / 240)), MixSchedule()
    moments = [Moment(0, 0, epoch, epochs) for epoch in range(epochs)]
    assert [m.epoch for m in moments if released.mixes(m)] == list(mixed)
    assert all(always.mixes(m) for m in moments)
    late = MixSchedule(window=(1 - 1 / epochs, 0.999))
    assert late.reaches(epochs) == (epochs < 10)


def test_probability_and_window_of_the_released_code() -> None:
    """Strictly 3 < e < 237 of 240, and half of the batches inside."""
    schedule = MixSchedule(0.5, (4 / 240, 237 / 240))
    steps = 97
    shares = [
        sum(schedule.mixes(Moment(epoch=e, epochs=240, step=s)) for s in range(steps)) / steps for e in range(240)
    ]
    assert shares[:4] == [0] * 4
    assert shares[237:] == [0] * 3
    assert all(0.2 < share < 0.8 for share in shares[4:237])
    assert sum(shares[4:237]) / 233 == pytest.approx(0.5, abs=0.01)


def test_all_processes_agree_on_mixing() -> None:
    schedule = MixSchedule(0.5)
    for step in range(40):
        assert schedule.mixes(Moment(step=step, rank=0)) == schedule.mixes(Moment(step=step, rank=1))


@pytest.mark.parametrize("place", ["seed", "stage", "epoch", "step"])
def test_what_is_mixed_and_how_depends_on_the_moment(place: str) -> None:
    back, fore, mixes, shares, chosen = batch(4, 1), batch(4, 2), set(), set(), set()
    for i in range(40):
        moment = replace(Moment(epochs=100), **{place: i})
        mixes.add(MixSchedule(0.5).mixes(moment))
        mixer = BatchMixer(IndexPairing(), CutMix(), MixSchedule(fraction=0.5))
        mixed = mixer(back, fore, look, PairingContext(moment))
        shares.add(float(mixed.image_share.min()))
        chosen.add(tuple(mixed.mixed.tolist()))
    assert mixes == {True, False}
    assert len(shares) > 1
    assert len(chosen) > 1


def test_a_missing_foreground_is_named() -> None:
    with pytest.raises(ValueError, match="foreground batch"):
        BatchMixer(IndexPairing(), CutMix())(batch(4, 1), None, look, PairingContext(Moment()))


def test_only_the_backgrounds_are_counted_and_only_when_the_cost_embeds_them() -> None:
    back, fore = batch(6, 1), batch(9, 2)
    counter = ConfusionCounter(K, ConfusionOrigin())
    mixer = BatchMixer(Curriculum(IndexPairing(), TransportPairing(), power=0.0), CutMix())
    mixer(back, fore, look, PairingContext(Moment()), counter)
    torch.testing.assert_close(counter.table.value.sum(1), torch.bincount(back.items.labels, minlength=K).float())
    counter = ConfusionCounter(K, ConfusionOrigin())
    BatchMixer(IndexPairing(), CutMix())(back, fore, look, PairingContext(Moment()), counter)
    assert not counter.table.value.any()


def test_same_moment_same_mix() -> None:
    back, fore = batch(12, 1), batch(12, 2)
    mixer = BatchMixer(TransportPairing(), CutMix())
    a, b, c = (mixer(back, fore, look, PairingContext(Moment(step=s))) for s in (5, 5, 6))
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)


@pytest.mark.parametrize(("n", "fraction"), [(4, 0.125), (16, 0.03), (1, 0.5), (10, 0.25)])
def test_the_share_of_mixed_images_is_right_in_small_batches_too(n: int, fraction: float) -> None:
    """On average; in each batch it is next to it."""
    schedule = MixSchedule(fraction=fraction)
    counts = []
    for step in range(2000):
        which = schedule.which(Moment(step=step), n)
        assert which is not None
        counts.append(int(which.sum()))
    assert set(counts) <= {int(n * fraction), int(n * fraction) + 1}
    deviation = (n * fraction % 1 * (1 - n * fraction % 1) / 2000) ** 0.5
    assert abs(sum(counts) / 2000 - n * fraction) < 4 * deviation


@pytest.mark.parametrize("values", [{"probability": 1.5}, {"fraction": -0.1}, {"window": (0.5, 0.2)}])
def test_impossible_schedules_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError):
        MixSchedule(**values)  # type: ignore[arg-type]
