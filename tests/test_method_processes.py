"""One pair of spawned processes trains every method of the contract's list, and both end with the same weights."""

import json
import math
from pathlib import Path

import pytest
import torch

from otmix.config import RunConfig
from otmix.methods import parse_method
from otmix.training.build import build_run
from otmix.training.contract import epochs, tiny_config, tiny_dataset, weights
from otmix.training.launch import train_in_processes
from otmix.training.processes import of_each
from otmix.training.reporter import Reporter, Silent
from otmix.training.setup import prepare
from test_method_contract import NAMES


def train_all(fabric: object, config: RunConfig, reporter: Reporter) -> Path:
    """Two epochs of each method; rank 0 writes the losses, and how far apart the weights are. (In the children.)"""
    assert config.out is not None
    folder = Path(config.out)
    found = {}
    for name in NAMES:
        own = tiny_config(parse_method(name), devices=2, epochs=2)
        (folder / name).mkdir(parents=True, exist_ok=True)
        run = build_run(fabric, folder / name, prepare(own, tiny_dataset()), Silent())  # type: ignore[arg-type]
        losses = list(epochs(run))
        first, second = of_each(run.fabric, weights(run))
        different = [key for key in first if not torch.equal(first[key], second[key])]
        found[name] = {"losses": losses, "different": different, "transport": run.history[-1]["transport_share"]}
    if run.fabric.global_rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    return folder


@pytest.mark.timeout(280)
def test_two_processes_train_every_method(tmp_path: Path) -> None:
    config = tiny_config(parse_method("ce"), devices=2, out=str(tmp_path))
    train_in_processes(train_all, config, Silent())
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == NAMES
    for name, one in found.items():
        assert all(map(math.isfinite, one["losses"])), name
        assert one["different"] == [], name
        assert (one["transport"] > 0) == ("otmix" in name), name
