"""Checkpoints: everything a run needs to go on as if it had never stopped, loaded without running anyone's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from otmix.errors import UserError
from otmix.files import write_atomic

FORMAT = "otmix-checkpoint"
VERSION = 2


def save_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write tensors and plain values atomically. UserError when the disk is full; the one before is kept."""
    write_atomic(path, lambda stream: torch.save({"format": FORMAT, "version": VERSION, **payload}, stream))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only=True`. UserError for anything that is not one of ours."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"there is no checkpoint {path}; start the run without --resume, or name the right folder with --out"
        ) from None
    except Exception as error:  # what torch raises depends on which byte of a file is wrong: any of twenty kinds
        raise UserError(
            f"{path} is not a checkpoint of otmix or is damaged ({type(error).__name__}); delete it to start the run "
            "afresh"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of otmix; name the folder of an otmix run with --out")
    if payload["version"] != VERSION:
        raise UserError(
            f"{path} was written by another version of otmix (format {payload['version']}, this one reads {VERSION}); "
            "install that version to go on"
        )
    return payload


def random_state() -> dict[str, Any]:
    """The state of torch's own generators, which dropout and the like draw from."""
    state = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    return state | ({"mps": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {})


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
