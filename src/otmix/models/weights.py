"""A file of weights: a state dict of ours, or of timm or torchvision for one of timm's backbones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from otmix.errors import UserError

OURS = "backbone."
HEAD = "head."
WRAPPERS = ("module.", "_orig_mod.")
CONTAINERS = ("state_dict", "model")


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """The state dict in `path`, without the prefixes of wrappers (DistributedDataParallel, torch.compile)."""

    path: str
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: str) -> WeightsFile:
        """Read .safetensors, or anything else by `torch.load(weights_only=True)`.

        Raises UserError when there is no such file or no state dict in it.
        """
        if not Path(path).is_file():
            raise UserError(f"there is no weights file {path}; give the path of a .safetensors, .pt or .pth file")
        try:
            Path(path).open("rb").close()
        except OSError as error:  # safetensors would say that there is no such file
            raise UserError(f"{path} cannot be read ({error.strerror}); give it read permission") from error
        content = _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read_pickle(path)
        for container in CONTAINERS:
            if isinstance(content, dict) and isinstance(content.get(container), dict):
                content = content[container]
        if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
            raise UserError(f"{path} holds no state dict; save model.state_dict() with torch.save or as safetensors")
        return cls(path, {_bare(str(key)): value for key, value in content.items()})

    @property
    def is_ours(self) -> bool:
        """Whether a `Classifier` was saved here."""
        return any(key.startswith(OURS) for key in self.state)

    def load_into(self, backbone: nn.Module, head: nn.Module, name: str) -> None:
        """Fill `backbone`, called `name`, completely, and `head` where it fits: a new set of classes keeps its new
        head.

        Raises UserError when the backbone's weights are not exactly those of the file.
        """
        found = self._part(OURS)
        try:
            backbone.load_state_dict(found)
        except RuntimeError as error:
            raise self.misfit(name, str(error)) from error
        kept, wanted = self._part(HEAD), head.state_dict()
        if kept.keys() == wanted.keys() and all(kept[key].shape == wanted[key].shape for key in wanted):
            head.load_state_dict(kept)

    def misfit(self, name: str, reason: str) -> UserError:
        """The error for a file that is not of the backbone `name`; of torch's long `reason` the first complaint."""
        lines = [line.strip() for line in reason.splitlines() if line.strip()]
        complaint = lines[min(1, len(lines) - 1)].rstrip(". ")
        short = complaint if len(complaint) <= 160 else complaint[:160] + "…"
        return UserError(f"{self.path} does not fit {name} ({short}); give a file of weights saved from a {name}")

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}


def _read_safetensors(path: str) -> object:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); save or download it again") from error


def _read_pickle(path: str) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on which byte of a file is wrong: any of twenty kinds
        raise UserError(
            f"{path} is no file of plain weights or is damaged ({type(error).__name__}); save model.state_dict() with "
            "torch.save, or copy the file again"
        ) from error


def _bare(key: str) -> str:
    """Without the prefixes of wrappers, in whatever order they lie around each other."""
    before = None
    while key != before:
        before = key
        for wrapper in WRAPPERS:
            key = key.removeprefix(wrapper)
    return key
