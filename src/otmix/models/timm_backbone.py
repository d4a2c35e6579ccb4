"""timm's backbones by name, with their input size and normalisation, and pretrained weights where they can be had."""

from __future__ import annotations

import difflib
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from otmix.errors import UserError
from otmix.models.weights import WeightsFile

PREFIX = "timm/"
PROBE_SECONDS = 5.0
HUB_FILENAMES = ("model.safetensors", "pytorch_model.bin")


class TimmDataConfig(NamedTuple):
    """What a timm model was trained on: the side of its images in pixels, and mean and deviation per channel."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def timm_data_config(name: str) -> TimmDataConfig:
    """Input size and normalisation of `name` ("timm/…", with or without a weights tag); nothing is built or downloaded.

    Raises UserError for a name that timm does not know.
    """
    config = _config(name)
    return TimmDataConfig(int(config.input_size[-1]), tuple(config.mean), tuple(config.std))


def takes_images(name: str, channels: int, image_size: int) -> bool:
    """Whether the timm model `name` can be built for images of this size and takes them; nothing is downloaded.

    Two are passed through it on the meta device, where nothing is computed, or else on the CPU: a few models do there
    what the meta device cannot.
    """

    def passes(device: str) -> bool:
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
                model, _ = timm_backbone(name, channels=channels, image_size=image_size)
                model.eval()(torch.zeros(2, channels, image_size, image_size))
        except (RuntimeError, AssertionError, IndexError, ValueError):
            return False
        return True

    return passes("meta") or passes("cpu")


def timm_backbone(
    name: str, *, channels: int, image_size: int, pretrained: bool = False, weights: WeightsFile | None = None
) -> tuple[nn.Module, int]:
    """A timm model without its classifier (`[B,channels,image_size,image_size] → [B,D]`), and D.

    Its weights are `weights`, in timm's own format, or `pretrained` ones, or new. timm fits the first convolution to
    the channels and positional tables to the size.
    Raises UserError for an unknown name, when pretrained weights cannot be had, or a file does not fit.
    """
    import timm

    plain = name.removeprefix(PREFIX)
    config = _config(name)
    # Only models with positional tables need to know the size beforehand; the others do not take the argument.
    size = {"img_size": image_size} if config.fixed_input_size else {}
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels, **size}
    if weights is not None:
        pretrained, overlay = True, _from_file(weights, config)
    else:
        overlay = _from_hub(name, config) if pretrained else {}
    try:
        model = timm.create_model(plain, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)
    except OSError as error:
        raise _no_weights(name, str(error).partition("\n")[0]) from error
    except (RuntimeError, KeyError) as error:
        if weights is None:
            raise
        raise weights.misfit(name, str(error)) from error
    # Some models pool and then widen once more before the classifier: then the wider features are what they return.
    return model, int(getattr(model, "head_hidden_size" if hasattr(model, "head_hidden_size") else "num_features"))


def unknown_backbone(name: str, ours: list[str]) -> UserError:
    """The error for a name that nobody knows, with close matches."""
    near = _close_matches(name, ours)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has the names for timm/NAME"
    return UserError(f"there is no backbone called {name}; {hint}")


def _close_matches(name: str, ours: list[str]) -> list[str]:
    """Up to four backbones, ours or timm's, with a name like `name`."""
    import timm

    plain = name.removeprefix(PREFIX)
    names = {known: known for known in ours} if not name.startswith(PREFIX) else {}
    names.update({known: PREFIX + known for known in timm.list_models() if known not in names})
    architecture = plain.partition(".")[0]
    tagged: list[str] = timm.list_models(f"{architecture}.*", pretrained=True) if "." in plain else []
    if tagged:
        return [PREFIX + known for known in tagged[:4]]
    return [names[match] for match in difflib.get_close_matches(plain, list(names), n=4)]


def _config(name: str) -> Any:
    import timm

    plain = name.removeprefix(PREFIX)
    # timm would take "hf-hub:…" and paths for models elsewhere, of which nothing is known here.
    if any(mark in plain for mark in ":/\\") or not timm.is_model(plain):
        raise unknown_backbone(name, [])
    try:
        config = timm.models.get_pretrained_cfg(plain)
    except RuntimeError as error:  # the architecture exists, this set of its weights does not
        raise unknown_backbone(name, []) from error
    return config if config is not None else timm.models.PretrainedCfg()


def _from_file(weights: WeightsFile, config: Any) -> dict[str, Any]:
    """What to tell timm so that it takes these weights, all of them and no others."""
    names = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
    heads = tuple(f"{layer}." for layer in names)
    state = {key: value for key, value in weights.state.items() if not (heads and key.startswith(heads))}
    # With the name of a classifier that the model lacks, timm would forgive everything else that is missing.
    return {"state_dict": state, "classifier": None}


def _from_hub(name: str, config: Any) -> dict[str, str]:
    """What to tell timm about where pretrained weights are: nothing, or the file in the hub's cache.

    The hub's client asks the network even for a cached file and tries again for most of a minute when there is none, so
    both are settled here first.
    """
    if not config.has_weights:
        raise UserError(f"timm has no pretrained weights for {name}; give --weights FILE or --no-pretrained")
    from huggingface_hub import constants, try_to_load_from_cache

    if not config.hf_hub_id:
        if not _in_torch_cache(config.url) and not _reachable(config.url):
            raise _no_weights(name, f"{config.url} cannot be reached")
        return {}
    if not config.custom_load:
        for filename in [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILENAMES:
            cached = try_to_load_from_cache(config.hf_hub_id, filename)
            if isinstance(cached, str):  # otherwise None, or a mark that the hub has no such file
                return {"file": cached}
    if constants.HF_HUB_OFFLINE:
        raise _no_weights(name, "HF_HUB_OFFLINE is set")
    if not _reachable(constants.ENDPOINT):
        raise _no_weights(name, f"{constants.ENDPOINT} cannot be reached")
    return {}


def _in_torch_cache(url: str | tuple[str, str]) -> bool:
    filename = url[1] if isinstance(url, tuple) else url.rpartition("/")[2]
    return (Path(torch.hub.get_dir()) / "checkpoints" / filename).exists()


def _reachable(url: str | tuple[str, str]) -> bool:
    """Whether a server answers at `url` within seconds; proxies are those of the environment."""
    request = urllib.request.Request(url[0] if isinstance(url, tuple) else url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except urllib.error.URLError as error:
        # Then someone answers, and the hub's client may know certificates that we do not.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False


def _no_weights(name: str, reason: object) -> UserError:
    return UserError(
        f"the pretrained weights of {name} cannot be had ({reason}); "
        "give --weights FILE, or start from scratch with --no-pretrained"
    )
