"""What every method must do: one list of checks (`otmix.training.contract`) over the table of methods. A method enters
by being in it.
"""

import math
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from otmix.cli import main
from otmix.errors import UserError
from otmix.losses import LOSSES, Criterion, CrossEntropy, register_loss
from otmix.methods import REBALANCING_PARTS, known_losses, known_mixers, loss_part, parse_method
from otmix.methods.parts import REBALANCING_DEFAULTS
from otmix.mixing import PIXEL_RULES, Mixup, mix_of_two
from otmix.protocols import PROTOCOLS, Overrides, ProtocolName
from otmix.settings import settings_of
from otmix.training import contract
from otmix.training.loop import train_epoch
from otmix.types import Batch, Mixed, Output, Target

NAMES = [
    *known_losses(),
    *(f"ce-{rebalancing}" for rebalancing in REBALANCING_PARTS),
    *(f"ce+{mixer}" for mixer in known_mixers()),
    *("ldam-drw+otmix", "ride", "ride+otmix", "ride-lade-drs+otmix-mixup", "ride-ib", "bbn", "bbn-ldam-drw"),
]


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract(name: str) -> None:
    findings = contract.check_method(name)
    assert len(findings) == len(contract.CHECKS)
    assert {found.check: found.problem for found in findings if found.problem} == {}


def test_every_setting_of_the_librarys_own_parts_has_a_source() -> None:
    for method in map(parse_method, NAMES):
        for name, _, meaning, source in method.settings(PROTOCOLS["clean"]):
            assert meaning and source, f"{method.name}: {name}"
        for key, setting in method.part_settings.items():
            assert setting.meaning and setting.source, f"{method.name}: {key}"
    rho = parse_method("ride").part_settings["model.rho"]
    assert rho.meaning == "how far the temperature follows the class frequencies"
    assert rho.source == "RIDE's code for CIFAR: 0.05; for ImageNet-LT: 0.02, for iNaturalist: 0.015"


@pytest.mark.parametrize("mixer", known_mixers())
def test_every_loss_trains_with_every_mixer(mixer: str, tmp_path: Path) -> None:
    """An epoch, with both labels of most images in play."""
    for loss in known_losses():
        method = parse_method(f"{loss}+{mixer}")
        begun = {"loss.start": 0.0} if loss == "ib" else {}  # which is cross-entropy before
        settings = replace(contract.tiny_config(method).set, parts=begun)
        run = contract.tiny_run(method, tmp_path / loss, epochs=1, set=settings)
        before = contract.weights(run)
        train_epoch(run)
        after = contract.weights(run)
        read = run.tally.read()
        assert read["mixed_share"] == 1.0, loss
        assert (read["transport_share"] == 1.0) == mixer.startswith("otmix"), loss
        assert all(bool(value.isfinite().all()) for value in after.values()), loss
        # without weight decay, so it is the loss that moves them
        still = [name for name, _ in run.state.model.named_parameters() if torch.equal(before[name], after[name])]
        assert not still, loss


class Hidden(Criterion):
    """A loss that keeps a count, so that a resumed run differs from one that was not stopped."""

    def __init__(self, counts: Any, grows: float = 1.0) -> None:
        super().__init__(counts)
        self.grows, self.calls = grows, 0

    def per_label(self, output: Output, labels: torch.Tensor, progress: float) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.cross_entropy(output.logits, labels, reduction="none") * self.grows**self.calls


class Deaf(Criterion):
    """A loss that raises on a batch of one image."""

    def per_label(self, output: Output, labels: torch.Tensor, progress: float) -> torch.Tensor:
        if len(labels) == 1:
            raise RuntimeError("one image is too few")
        return output.logits.sum(1)


class Headless(Criterion):
    """A loss that moves the features, and whose gradient on the head is zero."""

    def per_label(self, output: Output, labels: torch.Tensor, progress: float) -> torch.Tensor:
        assert output.features is not None
        return output.features.square().mean(1) + output.logits.sum(1) * 0.0


def test_a_loss_that_breaks_the_contract_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "hidden", Hidden)
    problems = {found.check: found.problem for found in contract.check_method("hidden")}
    assert "no line under `Args:`" in str(problems["builds from its name and explains itself"])
    monkeypatch.setitem(LOSSES, "deaf", Deaf)
    problems = {found.check: found.problem for found in contract.check_method("deaf")}
    assert "one image is too few" in str(problems["gives finite losses, and changes every parameter it trains"])
    monkeypatch.setitem(LOSSES, "headless", Headless)
    problems = {found.check: found.problem for found in contract.check_method("headless")}
    assert [problem for problem in problems.values() if problem] == [
        "these parameters never change: head.weight, head.bias"
    ]


class Lost(CrossEntropy):
    """NaN."""

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return super().per_label(output, labels, progress) * math.nan


class Huge(CrossEntropy):
    """A loss whose sum over a batch is not finite, though it is itself."""

    def label_free(self, output: Output, progress: float) -> Tensor:
        return torch.tensor(1e38)


class Moody(CrossEntropy):
    """Something new in each call, which moves no weight."""

    draw = torch.Generator().manual_seed(0)

    def label_free(self, output: Output, progress: float) -> Tensor:
        return torch.rand((), generator=self.draw)


class Jumpy(CrossEntropy):
    """The gradient of the run's last step has a random factor; no loss shows it."""

    draw = torch.Generator().manual_seed(0)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        loss = super().per_label(output, labels, progress)
        last = len(labels) == 1 and progress == (contract.EPOCHS - 1) / contract.EPOCHS
        return loss + (loss - loss.detach()) * torch.rand((), generator=self.draw) if last else loss


class Silent(CrossEntropy):
    """A loss that is 0 and yet has a gradient."""

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        loss = super().per_label(output, labels, progress)
        return loss - loss.detach()


class Doubtful(CrossEntropy):
    """Probabilities that do not sum to 1."""

    def probabilities(self, output: Output) -> Tensor:
        return super().probabilities(output) * 0.9


class Exact(CrossEntropy):
    """NaN for float32 logits that have been bfloat16, as in our loop."""

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        loss, logits = super().per_label(output, labels, progress), output.logits
        return loss * math.nan if logits.dtype == torch.float32 and logits.equal(logits.bfloat16().float()) else loss


class Float(CrossEntropy):
    """A loss that raises on bfloat16 logits."""

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        return super().per_label(output, labels, progress) + (output.logits @ torch.zeros(4, 1)).squeeze(1)


class Fragile(CrossEntropy):
    """Infinite for bfloat16 logits, late in the run."""

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        loss = super().per_label(output, labels, progress)
        return loss / 0 if output.logits.dtype == torch.bfloat16 and progress > 0.5 else loss


class Average(CrossEntropy):
    """One loss for a batch of bfloat16 logits."""

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        loss = super().per_label(output, labels, progress)
        return loss.mean() if output.logits.dtype == torch.bfloat16 else loss


@pytest.mark.parametrize(
    ("check", "loss", "problem"),
    [
        ("_trains", Lost, "not finite numbers at step 0 of epoch 0"),
        ("_trains", Huge, "the loss of epoch 0 is inf"),
        ("_repeats", Moody, "two runs with seed 1 have the losses"),
        ("_repeats", Jumpy, "two runs with seed 1 have other weights"),
        ("_repeats", Silent, "seeds 1 and 2 have the same losses"),
        ("_predicts", Doubtful, "the probabilities of three images: "),
        ("_works_in_bfloat16", Exact, "not finite numbers at step 0 of epoch 0"),
        (
            "_works_in_bfloat16",
            Float,
            r"take bfloat16 logits .* it raises RuntimeError: .*test_method_contract.py, line",
        ),
        ("_works_in_bfloat16", Fragile, "take bfloat16 logits .* it gives inf"),
        ("_works_in_bfloat16", Average, r"take bfloat16 logits .* it gives the shape \[\] for 8 images"),
    ],
)
def test_each_check_finds_a_loss_that_breaks_it(
    check: str, loss: type[Criterion], problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(LOSSES, "bad", loss)
    (run,) = (one for one in contract.CHECKS if one.__name__ == check)
    with pytest.raises((contract._Broken, UserError), match=problem):
        run(parse_method("bad"), tmp_path)


class Whole(Criterion):
    """Of the batch as a whole, and of no image alone."""

    title, paper = "Whole", "nobody"

    def forward(self, output: Output, target: Target, *_: Any, **__: Any) -> Tensor:
        return -(target.soft_labels(output.logits.shape[1]) * output.logits.float().log_softmax(1)).sum(1).mean()


def test_a_loss_of_the_whole_batch_alone_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "whole", Whole)
    assert [found for found in contract.check_method("whole") if found.problem is not None] == []


def test_every_loss_takes_bfloat16_logits(tmp_path: Path) -> None:
    """Alone, of experts and of branches."""
    for loss in known_losses():
        for name in (loss, f"ride-{loss}", f"bbn-{loss}"):
            contract._takes_bfloat16(contract.tiny_run(parse_method(name), tmp_path))


@pytest.mark.parametrize("start", [0.5, 0.9])
def test_a_listed_default_that_does_not_run_is_found_out(start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REBALANCING_DEFAULTS, "drs", {"start": start})
    problems = {found.check: found.problem for found in contract.check_method("ce-drs")}
    assert "are not those it runs with" in str(problems["writes its settings to YAML and reads the same ones back"])


def test_hidden_state_breaks_the_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hidden.__init__, "__defaults__", (1.3,))
    monkeypatch.setitem(LOSSES, "hidden", Hidden)
    problems = {found.check: found.problem for found in contract.check_method("hidden")}
    assert "differ after a resume" in str(
        problems["ends with the same weights when it is stopped in an epoch and resumed"]
    )


def test_the_command_checks_a_mixer_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "halves.py"
    file.write_text(
        '''
import torch
from otmix.mixing import register_mixer
from otmix.mixing.mixup import Mixup


@register_mixer("halves")
class Halves:
    """Equal parts of both images.

    Args:
        share: of the background (ours: 0.5).
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def draw(self, n, height, width, generator):
        return torch.full((1,), self.share, dtype=torch.float64)

    def apply(self, background, foreground, drawn):
        return Mixup().apply(background, foreground, drawn)
'''
    )
    try:
        for name in ("ce+halves", "ldam+otmix-halves"):
            assert main(["check-method", name, "--import", str(file)]) == 0
            printed = capsys.readouterr().out
            assert f"{len(contract.CHECKS)} of {len(contract.CHECKS)} checks passed" in printed
        assert main(["methods", "ce+halves", "--import", str(file)]) == 0
        assert "mixer.share  0.5" in capsys.readouterr().out
    finally:
        PIXEL_RULES.pop("halves", None)


@pytest.mark.parametrize(("name", "method"), [("prior-shift", "prior-shift+otmix"), ("beside", "ce+otmix-beside")])
def test_the_examples_of_contributing_keep_the_contract(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if f'("{name}")' in block)
    file = tmp_path / f"own_{name.replace('-', '_')}.py"
    file.write_text(code)
    try:
        assert main(["check-method", method, "--import", str(file)]) == 0, capsys.readouterr().out
    finally:
        LOSSES.pop(name, None)
        PIXEL_RULES.pop(name, None)


def test_annotations_for_type_checkers_alone_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "annotated.py"
    file.write_text(
        """from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from otmix.types import ClassCounts

def part(counts: ClassCounts, also: ClassCounts = None, tau: float = 1, on: bool | None = None): ...
"""
    )
    found = settings_of(runpy.run_path(str(file))["part"])
    assert {name: setting.kind for name, setting in found.items()} == {"tau": float, "on": bool | None}


def test_an_error_in_code_of_ones_own_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def broken():\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError) as found:
        runpy.run_path(str(file))["broken"]()
    assert contract._told(found.value) == "ZeroDivisionError: division by zero (mine.py, line 2)"


def test_a_part_of_ones_own_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By attributes that it need not have; its title is a name."""

    class Own(Hidden):
        title, paper, changes = "Prior Shift (v2)", "Doe et al., 2026", "the logits"
        disagrees = ("Doe's paper has 3, the code 5.",)

    class Rule(PIXEL_RULES["mixup"]):  # type: ignore[misc]
        title, paper = "Half and Half", "Roe et al., 2026"

    monkeypatch.setitem(LOSSES, "own", Own)
    monkeypatch.setitem(PIXEL_RULES, "rule", Rule)
    method = parse_method("own-drw+otmix-rule")
    assert method.title == "Prior Shift (v2)-DRW + OTmix (Half and Half)"
    assert parse_method(method.title) == method
    assert parse_method("prior shift (v2)") == parse_method("own")
    assert parse_method("Half and Half") == parse_method("ce+rule")
    assert method.parts[-1].changes.endswith("by Half and Half")
    assert main(["methods", "own+rule"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Prior Shift (v2) (Doe et al., 2026): the logits" in printed
    assert "Half and Half (Roe et al., 2026): a pixel rule of one's own" in printed
    assert "disagree Doe's paper has 3, the code 5. clean:" in printed

    monkeypatch.setitem(LOSSES, "other", type("Other", (Own,), {}))
    with pytest.raises(UserError, match="no method named"):  # two have this title
        parse_method("prior shift (v2)")
    monkeypatch.setitem(LOSSES, "plain", Hidden)
    assert (loss_part("plain").title, loss_part("plain").paper) == ("plain", "registered from outside")


@pytest.mark.parametrize(
    ("does", "problem"),
    [
        (lambda _, background: background.images.mul_(0.5), "apply changes the batches that it is given"),
        (lambda mixed, _: mixed.target.shares.copy_(torch.tensor([7.0, -6.0])), r"must lie in \[0, 1\] and sum to 1"),
        (lambda mixed, _: mixed.target.labels.add_(1), "a label that neither of its images has"),
        (lambda mixed, _: mixed.images.add_(torch.rand(())), "other images from the same drawn values"),
    ],
)
def test_a_mixer_that_breaks_its_word_is_found_out(
    does: Callable[[Mixed, Batch], object], problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken(Mixup):
        def apply(self, background: Batch, foreground: Batch, drawn: Tensor) -> Mixed:
            mixed = super().apply(background, foreground, drawn)
            does(mixed, background)
            return mixed

    monkeypatch.setitem(PIXEL_RULES, "broken", Broken)
    with pytest.raises(contract._Broken, match=problem):
        contract._mixes(parse_method("ce+otmix-broken"), tmp_path)


class Blend:
    """Images in one share for all; `said`: which of the two it calls the background's."""

    power, said = 1.0, 1.0

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        return 0.1 + 0.3 * torch.rand((), generator=generator)

    def apply(self, background: Batch, foreground: Batch, drawn: Tensor) -> Mixed:
        mixed = drawn * background.images**self.power + (1 - drawn) * foreground.images
        return mix_of_two(mixed, background, foreground, (drawn if self.said else 1 - drawn)[None])


@pytest.mark.parametrize(
    ("attributes", "keeps_its_word"),
    [({}, True), ({"said": 0.0}, False), ({"power": 0.0, "said": 0.0}, True)],
    ids=["as it says", "the other way round", "no mean of the two images"],
)
def test_a_mixer_must_say_how_much_is_background(
    attributes: dict[str, float], keeps_its_word: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(PIXEL_RULES, "blend", type("Other", (Blend,), attributes))
    method = parse_method("ce+otmix-blend")
    if keeps_its_word:
        contract._mixes(method, tmp_path)
        return
    with pytest.raises(contract._Broken, match=r"image_share must be the background's part .*; it is 0\.\d+, but of"):
        contract._mixes(method, tmp_path)


def test_the_command_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(LOSSES, "deaf", Deaf)
    assert main(["check-method", "deaf"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "one image is too few" in printed


def test_a_settings_value_reaches_the_part(tmp_path: Path) -> None:
    """Each group of settings, flipped alone, changes the pieces of the run."""

    def built(name: str, **parts: Any) -> Any:
        method = parse_method(name)
        changed = Overrides(parts={key.replace("__", "."): value for key, value in parts.items()})
        return contract.tiny_run(method, tmp_path, set=changed)

    assert built("logit-adjustment", loss__tau="2.5").stage.criterion.shift[0] == pytest.approx(
        2.5 * float(built("logit-adjustment").stage.criterion.shift[0])
    )
    assert built("ce+remix", mixer__kappa="inf").state.mixer.mixer.kappa == float("inf")
    assert built("ride", model__experts=2).state.model.head[1] is not None
    assert len(built("ride", model__experts=2).state.model.head) == 2
    assert built("ride", model__diversity=0).stage.criterion.diversity == 0
    assert built("ce-drw", rebalancing__start=0.1).stage.reweighting.start == 0.1
    assert built("ce-drs", rebalancing__start=0.9).background.law(0.8) is None
    assert built("ce-srs").background.law(0.0).tolist() == pytest.approx(
        [count**0.5 / sum(n**0.5 for n in contract.COUNTS) for count in contract.COUNTS]
    )


UNIFORM = [0.25] * 4
BY_RARITY = [(1 / count) / sum(1 / n for n in contract.COUNTS) for count in contract.COUNTS]


def test_unimix_draws_its_partners_by_its_law(tmp_path: Path) -> None:
    """n^tau, and nothing else does."""
    for tau, parts in ((-0.5, {}), (-2.0, {"mixer.tau": -2.0})):
        run = contract.tiny_run(parse_method("unimix"), tmp_path, set=Overrides(parts=parts))
        pairing: Any = run.state.mixer.pairing  # type: ignore[union-attr]
        assert pairing.class_weight.tolist() == pytest.approx([count**tau for count in contract.COUNTS])
    other: Any = contract.tiny_run(parse_method("remix"), tmp_path).state.mixer
    assert other.pairing.class_weight is None


@pytest.mark.parametrize("name", ["ib", "ib-drw+otmix", "ride-ib"])
def test_ib_has_its_own_steps_of_the_learning_rate(name: str, tmp_path: Path) -> None:
    """x .01 from 100 of 200 epochs, where it begins, 1e-4 from 160, 1e-6 from 180: those of the recipe are replaced."""
    run = contract.tiny_run(parse_method(name), tmp_path, epochs=10)
    factors = [1.0] * 5 + [1e-2] * 3 + [1e-4, 1e-6]
    assert [run.stage.schedule.factor(epoch, 10) for epoch in range(10)] == factors
    run.epoch = 8
    train_epoch(run)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(run.stage.optimizer.lr * 1e-4)
    early = contract.tiny_run(parse_method(name), tmp_path, epochs=10, set=Overrides(parts={"loss.start": 0.2}))
    assert early.stage.schedule.factor(2, 10) == 1e-2


@pytest.mark.parametrize(
    ("name", "settings", "law"),
    [
        ("bbn", {}, BY_RARITY),
        ("bbn-ldam-drw", {}, BY_RARITY),
        ("cmo", {}, UNIFORM),
        ("cmo", {"foreground_r": 1.0}, BY_RARITY),
    ],
)
def test_the_law_of_the_second_stream(name: str, settings: dict[str, Any], law: list[float], tmp_path: Path) -> None:
    """BBN's reversed stream is its own: a class is drawn ~ 1/n, whatever the protocol says of foregrounds."""
    run = contract.tiny_run(parse_method(name), tmp_path, set=Overrides(**settings))
    assert run.foreground is not None
    drawn = run.foreground.draw(20000, torch.Generator().manual_seed(0)).labels
    assert (torch.bincount(drawn, minlength=4) / 20000).tolist() == pytest.approx(law, abs=0.012)


@pytest.mark.parametrize(
    ("name", "probability", "window", "rule"),
    [
        ("cutmix", 0.5, (0, 1), {"alpha": 1, "box": "clipped", "per": "batch"}),
        ("mixup", 1, (0, 1), {"alpha": 1, "per": "batch"}),
        ("saliencymix", 0.5, (0, 1), {"alpha": 1, "per": "image"}),
        ("remix", 1, (0, 1), {"alpha": 1, "per": "batch", "kappa": 3, "tau": 0.5}),
        ("unimix", 1, (0, 1), {"alpha": 0.8, "tau": -0.5}),
        ("otmix", 0.5, (4 / 240, 237 / 240), {"alpha": 4, "box": "exact", "per": "batch"}),
        ("otmix-mixup", 0.5, (4 / 240, 237 / 240), {"alpha": 4, "per": "batch"}),
        ("otmix-saliencymix", 0.5, (4 / 240, 237 / 240), {"alpha": 4, "per": "image"}),
    ],
)
def test_a_pixel_rule_runs_with_the_numbers_of_its_paper(
    name: str, probability: float, window: tuple[float, float], rule: dict[str, Any], tmp_path: Path
) -> None:
    """Within the batch; with foregrounds of the second stream, with those of the protocol."""
    mixer = contract.tiny_run(parse_method(name), tmp_path, set=Overrides()).state.mixer
    assert mixer is not None
    assert (mixer.schedule.probability, mixer.schedule.window) == (probability, window)
    assert {key: value for key, value in vars(mixer.mixer).items() if key != "counts"} == rule


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("ce-drw", ("weighted-mean", "weighted-mean", "weighted-mean")),
        ("ce-drw+remix", ("mean", "mean", "mean")),
        ("ce-drw+unimix", ("mean", "mean", "mean")),
        ("ce-drw+cutmix", ("mean", "weighted-mean", "weighted-mean")),
        ("ce-drw+otmix", ("mean", "weighted-mean", "weighted-mean")),
        ("ce-drw+otmix-remix", ("mean", "weighted-mean", "weighted-mean")),
        ("ce-drw+cmo-unimix", ("mean", "weighted-mean", "weighted-mean")),
    ],
)
def test_how_class_weights_are_averaged(name: str, means: tuple[str, str, str]) -> None:
    """Under `paper`, `official` and `clean`. Remix and UniMix within the batch have the mean of their papers' codes."""
    method = parse_method(name)
    protocols: tuple[ProtocolName, ...] = ("paper", "official", "clean")
    assert tuple(method.protocol(protocol).weighted_mean for protocol in protocols) == means


def test_a_value_has_one_spelling() -> None:
    """2, 2.0 and 2e0 are one run; what a setting cannot be is refused."""
    method = parse_method("logit-adjustment")
    spelt = [method.converted(Overrides(parts={"loss.tau": value})) for value in (2, 2.0, "2e0", "2.0")]
    assert all(one == spelt[0] for one in spelt)
    assert type(spelt[0].parts["loss.tau"]) is float
    with pytest.raises(UserError, match=r"--set.loss.tau must be a number, it is x"):
        method.converted(Overrides(parts={"loss.tau": "x"}))
    run = parse_method("otmix").converted(Overrides(confusion_run="runs/a/"))
    assert run.confusion_run == str(Path("runs/a"))


def test_settings_without_annotation_or_of_other_types(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Criterion):
        def __init__(self, counts, gamma=2.0, sizes=(1, 2)) -> None:  # type: ignore[no-untyped-def]
            super().__init__(counts)

    monkeypatch.setitem(LOSSES, "own", Own)
    settings = parse_method("own").part_settings
    assert list(settings) == ["loss.gamma"]
    assert settings["loss.gamma"].convert("3") == 3.0


@pytest.mark.parametrize("name", ["MyLoss", "x-drw", "ride-x", "a+b", ""])
def test_a_loss_cannot_have_a_name_that_means_something_else(name: str) -> None:
    with pytest.raises(UserError, match="cannot be named"):
        register_loss(name)


def test_listed_defaults_are_those_that_run(tmp_path: Path) -> None:
    for name, key in (
        ("ce-srs", "rebalancing.power"),
        ("ce-drs", "rebalancing.start"),
        ("ce-drw", "rebalancing.start"),
    ):
        method = parse_method(name)
        run = contract.tiny_run(method, tmp_path, schedule="steps")
        law = run.stage.reweighting or run.stage.background_law.__self__  # type: ignore[union-attr]
        assert getattr(law, key.partition(".")[2]) == method.part_settings[key].default
    assert "mixer.tau" in parse_method("unimix").part_settings
    assert "mixer.tau" not in parse_method("otmix-unimix").part_settings


@pytest.mark.parametrize(
    ("schedule", "start"),
    [
        ("steps", 160 / 240),
        ("ldam", 160 / 200),
        ("bbn", 160 / 200),
        ("imagenet-lt", 80 / 200),
        ("inaturalist", 160 / 210),
        ("cosine", 160 / 240),
    ],
)
def test_what_is_deferred_begins_when_the_schedule_says(schedule: str, start: float, tmp_path: Path) -> None:
    """Class weights, drawing classes evenly, and RIDE's temperature, in the run that is built."""
    for name in ("ce-drw", "ldam-drw+otmix", "ride", "bbn-ce-drw"):
        run = contract.tiny_run(parse_method(name), tmp_path, schedule=schedule)
        assert run.stage.reweighting is not None, name
        assert run.stage.reweighting.class_weight(start - 1e-6) is None, name
        assert run.stage.reweighting.class_weight(start) is not None, name
        if name == "ride":
            assert run.stage.criterion.temperature_start == start
    for name in ("ce-drs", "ldam-drs+otmix"):
        law = contract.tiny_run(parse_method(name), tmp_path, schedule=schedule).background.law
        assert law is not None, name
        assert law(start - 1e-6) is None, name
        assert law(start) is not None, name


@pytest.mark.parametrize("bad", [{"rebalancing.start": 5}, {"rebalancing.beta": 1}])
def test_reweighting_out_of_range_is_refused_before_the_run(bad: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"start of re-weighting|beta of the effective number"):
        contract.tiny_run(parse_method("ce-drw"), tmp_path, set=Overrides(parts=bad))


def test_confusion_pairing_follows_officials_leak() -> None:
    method = parse_method("confusion")
    assert [method.protocol(name).confusion_from for name in ("clean", "paper", "official")] == [
        "held-out",
        "held-out",
        "test",
    ]
