"""The end of a run: the final evaluation, and everything that is written once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from otmix.data import items_of
from otmix.files import write_atomic, write_json
from otmix.reports.page import write_page
from otmix.training.loop import RunState, best_path
from otmix.training.pictures import draw_pictures
from otmix.training.processes import summed
from otmix.training.records import environment, read_environment
from otmix.training.setup import Plan, split_of
from otmix.training.watching import evaluate, save_weights


def finish(run: RunState, plan: Plan) -> None:
    """The final evaluation and everything that is written once. `result.json` comes last: a run that has it is
    finished.
    """
    config, dataset, method = plan.config, plan.dataset, plan.method
    if plan.protocol.headline == "best-on-test" and run.best is not None:
        from safetensors.torch import load_file

        run.state.model.load_state_dict(load_file(best_path(run)))
    items = items_of(split_of(dataset, config.final_split))
    store = plan.store(config.final_split, run.fabric, run.reporter.loading)
    evaluation, probabilities = evaluate(run, plan, store, items)
    pairs = {by: table.gathered(summed(run.fabric)) for by, table in run.tally.pairs.items()}
    if run.fabric.global_rank != 0:
        run.fabric.barrier()
        return
    save_weights(run, "model.safetensors")
    _save_arrays(run, items.labels, probabilities, pairs)
    seconds = [row["seconds"] for row in run.history]
    where = environment(run.fabric.device)
    saw = read_environment(run.run_dir).get("looks_at_test")  # runs of before have not noted it
    result = {
        "method": method.name,
        "title": method.title,
        "protocol": config.protocol,
        "set": config.to_dict()["set"],
        "looks_at_test": plan.looks_at_test() if saw is None else saw,
        "confusion": None if run.confusion is None else str(run.confusion.origin),
        "bn_statistics": run.bn_statistics,
        # how many epochs the model has had; rows of metrics.jsonl, and `best`, count them from 0
        "headline_epoch": run.best["epoch"] + 1 if run.best is not None else config.epochs,
        "data": dataset.name,
        "split": config.final_split,
        "seed": config.seed,
        "epochs": config.epochs,
        "backbone": config.backbone,
        "hash": plan.config.hash,
        "commit": where["commit"],
        "device": where["device"],
        "precision": config.precision,
        "seconds_per_epoch": float(np.median(seconds)),
        "evaluation": evaluation.to_dict(),
    }
    draw_pictures(run, plan)
    write_json(run.run_dir / "result.json", result)
    write_page(run.run_dir)
    run.reporter.finish(result, run.run_dir)
    run.fabric.barrier()


def _save_arrays(run: RunState, labels: Tensor, probabilities: Tensor, pairs: dict[str, Tensor]) -> None:
    arrays: dict[str, Any] = {
        "index": np.arange(len(labels)),
        "labels": labels.cpu().numpy(),
        # of the float16 below the largest two may be equal, and the first is not always the one that was counted
        "predicted": probabilities.max(1).indices.numpy(),
        "probabilities": probabilities.half().numpy(),
    }
    _write_npz(run.run_dir / "predictions.npz", arrays)
    tables: dict[str, Any] = {by: table.to_dense().cpu().long().numpy() for by, table in pairs.items()}
    _write_npz(run.run_dir / "pairs.npz", tables)


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # a zip file whose stream a Ctrl-C has closed would complain when it is thrown away
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, lambda stream: stream.write(buffer.getbuffer()))
