"""Every trainable method as a value, and the grammar of their names: `[loss][-drw][+mixer]`.

`ce+otmix` is canonical in files and keys; `otmix` is one of its aliases. The titles are how the paper's tables print
them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields

from otmix.errors import UserError
from otmix.protocols import PROTOCOLS, Protocol, ProtocolName


@dataclass(frozen=True)
class Part:
    """A loss or a mixer as the listings show it."""

    title: str
    paper: str
    changes: str


LOSS_PARTS: dict[str, Part] = {
    "ce": Part("ERM", "empirical risk minimisation with cross-entropy", "nothing: the plain baseline"),
    "ldam": Part(
        "LDAM",
        "Cao et al., NeurIPS 2019",
        "a margin of .5 (n/n_min)^(-1/4) on the true class, and a normed head with scale 30 (LDAM's code has the scale "
        "in the loss: the same numbers)",
    ),
    "focal": Part(
        "Focal",
        "Lin et al., ICCV 2017",
        "cross-entropy times 1 - p of the true class (softmax form, gamma 1, as in LDAM's code); the released "
        "code of OTmix multiplies by 10, we do not",
    ),
    "cb-softmax": Part(
        "CB Softmax",
        "Cui et al., CVPR 2019",
        "cross-entropy with effective-number class weights (beta .9999) from the first epoch; with -drw they are "
        "squared later",
    ),
    "cb-sigmoid": Part(
        "CB Sigmoid",
        "Cui et al., CVPR 2019",
        "binary cross-entropies summed over the classes, with the weights of cb-softmax; the head's bias begins at "
        "-log(K-1) and is not decayed",
    ),
    "cb-focal": Part(
        "CB Focal",
        "Cui et al., CVPR 2019",
        "cb-sigmoid with each binary term times 1 - p of its truth (gamma 1; the sigmoid form, unlike focal)",
    ),
    "balanced-softmax": Part(
        "BALMS",
        "Ren et al., NeurIPS 2020",
        "cross-entropy of z + log n in training, plain z at test; the loss alone, without the meta sampler, as in the "
        "released codes of CMO and OTmix",
    ),
    "logit-adjustment": Part(
        "Logit Adjustment",
        "Menon et al., ICLR 2021",
        "cross-entropy of z + tau log(n/N) in training, plain z at test; with tau 1, the default, balanced softmax",
    ),
}
DRW = Part(
    "DRW",
    "Cao et al., NeurIPS 2019",
    "effective-number class weights (Cui et al. 2019, beta .9999) from 160/240 of the epochs",
)
MIXER_PARTS: dict[str, Part] = {
    "cmo": Part("CMO", "Park et al., CVPR 2022", "pastes rare-class foregrounds into backgrounds taken at random"),
    "otmix": Part(
        "OTmix",
        "Gao et al., NeurIPS 2023",
        "pastes rare-class foregrounds into the backgrounds that optimal transport chooses",
    ),
}
ALIASES: dict[str, str] = {
    "erm": "ce",
    "drw": "ce-drw",
    "erm-drw": "ce-drw",
    "cmo": "ce+cmo",
    "otmix": "ce+otmix",
    "balms": "balanced-softmax",
    "balms-drw": "balanced-softmax-drw",
}

# which settings of a protocol a mixer reads: the rest cannot change its result, so they are neither listed nor accepted
# for it
_MIX = (
    "mix_probability",
    "mix_from",
    "mix_until",
    "mix_fraction",
    "foreground_law",
    "foreground_r",
    "alpha",
    "box",
    "box_per",
)
_TRANSPORT = tuple(f.name for f in fields(Protocol) if f.name not in (*_MIX, "weighted_mean", "headline"))
MIXER_SETTINGS: dict[str | None, tuple[str, ...]] = {None: (), "cmo": _MIX, "otmix": (*_MIX, *_TRANSPORT)}


@dataclass(frozen=True)
class Method:
    """A loss, deferred re-weighting or not, and a mixer or none."""

    loss: str
    drw: bool = False
    mixer: str | None = None

    @property
    def name(self) -> str:
        """The canonical name, e.g. `ce-drw+otmix`."""
        return self.loss + ("-drw" if self.drw else "") + (f"+{self.mixer}" if self.mixer else "")

    @property
    def title(self) -> str:
        """As the paper's tables print it, e.g. `ERM-DRW + OTmix`."""
        base = _loss_part(self.loss).title + ("-DRW" if self.drw else "")
        return f"{base} + {MIXER_PARTS[self.mixer].title}" if self.mixer else base

    @property
    def parts(self) -> list[Part]:
        return [_loss_part(self.loss), *([DRW] if self.drw else []), *([MIXER_PARTS[self.mixer]] if self.mixer else [])]

    @property
    def setting_names(self) -> tuple[str, ...]:
        """The settings of a protocol that can change this method's result."""
        return (*MIXER_SETTINGS[self.mixer], *(("weighted_mean",) if self.drw and self.mixer else ()), "headline")

    def settings(self, protocol: Protocol) -> Iterator[tuple[str, object, str, str]]:
        """Each setting that matters here: name, value under `protocol`, meaning, source."""
        for f in fields(Protocol):
            if f.name in self.setting_names:
                yield f.name, getattr(protocol, f.name), f.metadata["meaning"], f.metadata["why"]


def _loss_part(name: str) -> Part:
    return LOSS_PARTS.get(name) or Part(name, "registered from outside", "a loss of one's own")


def known_losses() -> list[str]:
    """Names of all losses, those registered from outside included."""
    from otmix.losses import LOSSES  # here, so that listing methods needs no torch until a name is looked up

    return list(LOSSES)


def parse_method(name: str) -> Method:
    """`[loss][-drw][+mixer]`, or an alias, e.g. `erm`, `cmo`, `drw+otmix` (the loss is `ce` where none is given).
    Raises UserError with the nearest names.
    """
    text = name.strip().lower()
    left, plus, right = ALIASES.get(text, text).partition("+")
    left = ALIASES.get(left, left)
    if "+" in left:  # an alias that carries a mixer, followed by another one
        raise _unknown(name)
    drw = left.endswith("-drw")
    loss = left.removesuffix("-drw")
    if loss not in known_losses() or (plus and right not in MIXER_PARTS):
        raise _unknown(name)
    return Method(loss, drw, right or None)


def all_methods() -> list[Method]:
    """Every combination of the grammar, baselines first."""
    return [
        Method(loss, drw, mixer) for loss in known_losses() for drw in (False, True) for mixer in (None, *MIXER_PARTS)
    ]


def _unknown(name: str) -> UserError:
    names = [*ALIASES, *(method.name for method in all_methods())]
    close = difflib.get_close_matches(name.lower(), names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "a name is [loss][-drw][+mixer]."
    return UserError(f"there is no method named {name!r}; {hint} `otmix methods` lists them all")


def protocol_differences(name: ProtocolName) -> dict[str, tuple[object, object]]:
    """Settings in which a protocol differs from `clean`: name -> (clean's value, its value)."""
    clean, other = PROTOCOLS["clean"], PROTOCOLS[name]
    return {
        f.name: (getattr(clean, f.name), getattr(other, f.name))
        for f in fields(Protocol)
        if getattr(clean, f.name) != getattr(other, f.name)
    }
