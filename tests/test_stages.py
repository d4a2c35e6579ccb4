"""A run of two stages: what the second resets, freezes and keeps; the checkpoint knows which stage it is in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from otmix.config import RunConfig
from otmix.protocols import Overrides
from otmix.training import Interrupted, train
from otmix.training import setup as training_setup
from otmix.training.checkpoint import load_checkpoint
from otmix.training.loop import StopRequest
from otmix.training.stage import LossParts, Stage, mix_and_classify

CONFIG = RunConfig(
    data="digits",
    method="otmix",
    epochs=3,
    batch_size=128,
    accelerator="cpu",
    set=Overrides(bn_statistics="mixed"),
)


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method's own stage, then one that retrains the head alone on unmixed images, with BatchNorm frozen."""
    build = training_setup.build_stages

    def build_two(*args: Any) -> tuple[Stage, ...]:
        (first,) = build(*args)
        head = replace(first, name="head", epochs=2, mixer=None, foreground_probability=None)
        return first, replace(head, reset=("head",), trains=("head",), batchnorm="eval")

    monkeypatch.setattr(training_setup, "build_stages", build_two)


@pytest.mark.usefixtures("two_stages")
def test_the_second_stage_trains_the_head_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(CONFIG, out=str(tmp_path / "two")))
    after = load_file(tmp_path / "two" / "model.safetensors")
    monkeypatch.undo()
    train(replace(CONFIG, out=str(tmp_path / "one")))
    before = load_file(tmp_path / "one" / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    # not the backbone's weights, nor BatchNorm's statistics, which the first stage made anew at its end
    assert changed == {"head"}
    assert json.loads((tmp_path / "two" / "result.json").read_text())["bn_statistics"] == "mixed"
    history = load_checkpoint(tmp_path / "two" / "checkpoint.pt")["history"]
    assert [(row["stage"], row["epoch"]) for row in history] == [("ce+otmix", e) for e in range(3)] + [
        ("head", e) for e in range(2)
    ]
    assert [row["mixed_share"] for row in history[3:]] == [0.0, 0.0]


@pytest.mark.usefixtures("two_stages")
@pytest.mark.parametrize("stop_after", [10, 14])  # of 12 + 8 steps: in the first stage, in the second
def test_resumes_in_either_stage(tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train(replace(CONFIG, out=str(tmp_path / "whole")))
    asked = 0

    def agreed(self: StopRequest, fabric: object, other: bool) -> list[bool]:
        nonlocal asked
        asked += 1
        return [asked == stop_after, other]

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agreed_with", agreed)
        with pytest.raises(Interrupted):
            train(replace(CONFIG, out=str(tmp_path / "half")))
    train(replace(CONFIG, out=str(tmp_path / "half"), resume=True))
    whole, half = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "half"))
    assert whole == half


def test_a_method_may_bring_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What BBN or M2m need: `step` is replaced, the loop does the rest."""
    build, calls = training_setup.build_stages, []

    def step(state: Any, items: Any, context: Any) -> LossParts:
        calls.append(context.moment.step)
        parts = mix_and_classify(state, items, context)
        return replace(parts, loss=2 * parts.loss)

    monkeypatch.setattr(training_setup, "build_stages", lambda *args: (replace(build(*args)[0], step=step),))
    train(replace(CONFIG, method="ce", set=Overrides(), epochs=1, out=str(tmp_path / "run")))
    assert calls == [0, 1, 2, 3]
