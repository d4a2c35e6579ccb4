"""What every method must do: one list of checks (`otmix.training.contract`) over the table of methods. A method enters
by being in it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from otmix.cli import main
from otmix.losses import LOSSES, Criterion
from otmix.methods import REBALANCING_PARTS, known_losses, known_mixers, parse_method
from otmix.mixing import PIXEL_RULES
from otmix.protocols import Overrides
from otmix.training import contract
from otmix.training.loop import train_epoch
from otmix.types import Output

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


@pytest.mark.parametrize("mixer", known_mixers())
def test_every_loss_trains_with_every_mixer(mixer: str, tmp_path: Path) -> None:
    """An epoch, with both labels of most images in play."""
    for loss in known_losses():
        run = contract.tiny_run(parse_method(f"{loss}+{mixer}"), tmp_path / loss, epochs=1)
        before = contract.weights(run)
        train_epoch(run)
        after = contract.weights(run)
        read = run.tally.read()
        assert read["mixed_share"] == 1.0, loss
        assert (read["transport_share"] == 1.0) == mixer.startswith("otmix"), loss
        assert all(bool(value.isfinite().all()) for value in after.values()), loss
        assert not torch.equal(before["head.weight"], after["head.weight"]), loss


class Hidden(Criterion):
    """A loss that keeps a count, so that a resumed run differs from one that was not stopped."""

    def __init__(self, counts: Any, grows: float = 1.0) -> None:
        super().__init__(counts)
        self.grows, self.calls = grows, 0

    def per_label(self, output: Output, labels: torch.Tensor, progress: float) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.cross_entropy(output.logits, labels, reduction="none") * self.grows**self.calls


class Deaf(Criterion):
    """A loss that reaches no parameter, and raises on a batch of one image."""

    def per_label(self, output: Output, labels: torch.Tensor, progress: float) -> torch.Tensor:
        if len(labels) == 1:
            raise RuntimeError("one image is too few")
        return output.logits.sum(1) * 0.0


def test_a_loss_that_breaks_the_contract_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "hidden", Hidden)
    problems = {found.check: found.problem for found in contract.check_method("hidden")}
    assert "no line under `Args:`" in str(problems["builds from its name and explains itself"])
    monkeypatch.setitem(LOSSES, "deaf", Deaf)
    problems = {found.check: found.problem for found in contract.check_method("deaf")}
    assert "one image is too few" in str(problems["gives finite losses, and changes every parameter it trains"])


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
