"""A method as a value: a loss, a rebalancing, a mixer, an architecture, and every setting of theirs with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otmix.methods.parts import (
    ALIASES,
    ARCHITECTURE_PARTS,
    CONFUSION_DEFAULTS,
    LOSS_PARTS,
    PAIRING_PARTS,
    PAIRINGS,
    PIXEL_DEFAULTS,
    PIXEL_PARTS,
    REBALANCING_DEFAULTS,
    REBALANCING_PARTS,
    RUNNING_STATISTICS,
    SECOND_STREAM_DEFAULTS,
    UNMIXED_DEFAULTS,
    PairingName,
    Part,
)
from otmix.protocols import Overrides, Protocol, ProtocolName, resolve
from otmix.settings import Setting, settings_of

if TYPE_CHECKING:
    from otmix.models import Architecture

# which settings of a protocol a method reads: the rest cannot change its result, so they are neither listed nor
# accepted for it
_SCHEDULE = ("mix_probability", "mix_from", "mix_until", "mix_fraction", "bn_statistics")
_OF_PIXELS = {"alpha": "alpha", "box": "box", "box_per": "per"}
"""Settings that a pixel rule reads if its constructor takes the parameter."""
_FOREGROUND = ("foreground_law", "foreground_r")
_CONFUSION = tuple(f.name for f in fields(Protocol) if f.name.startswith("confusion_"))
_TRANSPORT = (
    *(f.name for f in fields(Protocol) if f.name.startswith("curriculum_")),
    *("features", "omega", "metric", "keep_diagonal", "epsilon", "select"),
)


@dataclass(frozen=True)
class Method:
    """A loss, how the classes are rebalanced (`drw`, `drs`, `cbs`, `srs`) or not, a mixer or none, an architecture."""

    loss: str
    rebalancing: str | None = None
    mixer: str | None = None
    architecture: Architecture = "plain"

    @property
    def name(self) -> str:
        """The canonical name, e.g. `ce-drw+otmix`."""
        base = "" if self.architecture == "plain" else f"{self.architecture}-"
        rebalanced = f"-{self.rebalancing}" if self.rebalancing else ""
        return f"{base}{self.loss}{rebalanced}" + (f"+{self.mixer}" if self.mixer else "")

    @property
    def title(self) -> str:
        """As the paper's tables print it, e.g. `ERM-DRW + OTmix (Mixup)`."""
        base = loss_part(self.loss).title
        if self.rebalancing:
            base += f"-{REBALANCING_PARTS[self.rebalancing].title}"
        if self.architecture != "plain":
            architecture = ARCHITECTURE_PARTS[self.architecture].title
            base = (
                architecture
                if f"{self.architecture}-{base_name(self)}" in ALIASES.values()
                else f"{architecture} ({base})"
            )
        return f"{base} + {mixer_part(self.mixer).title}" if self.mixer else base

    @property
    def parts(self) -> list[Part]:
        found = [] if self.architecture == "plain" else [ARCHITECTURE_PARTS[self.architecture]]
        found.append(loss_part(self.loss))
        if self.rebalancing:
            found.append(REBALANCING_PARTS[self.rebalancing])
        return [*found, mixer_part(self.mixer)] if self.mixer else found

    @property
    def drw(self) -> bool:
        return self.rebalancing == "drw"

    @property
    def pairing(self) -> PairingName | None:
        """Who finds the background of a foreground; None without a mixer."""
        return _split(self.mixer)[0] if self.mixer else None

    @property
    def pixels(self) -> str | None:
        """The pixel rule; None without a mixer."""
        return _split(self.mixer)[1] if self.mixer else None

    @property
    def second_stream(self) -> bool:
        """Whether foregrounds are drawn from a stream of their own (eq. 3)."""
        return self.pairing not in (None, "within-batch")

    @property
    def uses_confusion(self) -> bool:
        return self.pairing in ("transport", "confusion")

    @property
    def setting_names(self) -> tuple[str, ...]:
        """The settings of a protocol that can change this method's result."""
        names: tuple[str, ...] = ()
        if self.pixels is not None:
            takes = settings_of(_pixel_rule(self.pixels))
            names = (*_SCHEDULE, *(name for name, parameter in _OF_PIXELS.items() if parameter in takes))
        if self.second_stream:
            names += _FOREGROUND
        if self.pairing == "transport":
            names += _TRANSPORT
        if self.uses_confusion:
            names += _CONFUSION
        ordered = [f.name for f in fields(Protocol) if f.name in names]
        return (*ordered, *(("weighted_mean",) if self.drw else ()), "headline")

    @property
    def part_settings(self) -> dict[str, Setting]:
        """The settings of its parts, by their keys: `loss.tau`, `mixer.kappa`, `model.experts`, `rebalancing.start`."""
        parts = {
            "loss": (_loss(self.loss),),
            "mixer": () if self.pixels is None else (_pixel_rule(self.pixels),),
            "model": _architecture(self.architecture),
            "rebalancing": _rebalancing(self.rebalancing),
        }
        found = ((group, *item) for group, part in parts.items() for one in part for item in settings_of(one).items())
        of_protocol = {f"mixer.{parameter}" for parameter in _OF_PIXELS.values()}
        keyed = {f"{group}.{name}": setting for group, name, setting in found}
        idle = self._idle | of_protocol
        own = {f"rebalancing.{name}": value for name, value in REBALANCING_DEFAULTS.get(self.rebalancing, {}).items()}
        return {
            key: replace(setting, default=own.get(key, setting.default))
            for key, setting in keyed.items()
            if key not in idle
        }

    @property
    def _idle(self) -> set[str]:
        """What a pixel rule says of partners within the batch, where the partners come from elsewhere."""
        if self.pixels is None or self.pairing == "within-batch":
            return set()
        return {f"mixer.{name}" for name in getattr(_pixel_rule(self.pixels), "of_partners", ())}

    def converted(self, overrides: Overrides) -> Overrides:
        """The same settings, each in its type and in one spelling: `2`, `2.0` and `"2e0"` are one value, one run.

        Raises UserError for a value that its setting cannot have.
        """
        known = self.part_settings
        parts = {
            key: known[key].convert(value, f"--set.{key}") if key in known else value
            for key, value in overrides.parts.items()
            if value is not None or key not in known or known[key].takes_none  # else nothing was said
        }
        run = overrides.confusion_run
        return replace(overrides, parts=parts, confusion_run=None if run is None else str(Path(run)))

    def only_own(self, overrides: Overrides) -> Overrides:
        """The settings among these that this method reads; of a comparison, the others are meant for other methods."""
        own = {*self.setting_names, *self.part_settings}
        return self.converted(Overrides.from_dict({k: v for k, v in overrides.to_dict().items() if k in own}))

    @property
    def defaults(self) -> dict[str, tuple[object, str]]:
        """Settings of a protocol that this method has its own value for, whatever the protocol: (value, source)."""
        if self.pixels is None:
            return UNMIXED_DEFAULTS
        if self.pairing == "within-batch":
            return PIXEL_DEFAULTS.get(self.pixels, {}) | RUNNING_STATISTICS
        own = SECOND_STREAM_DEFAULTS.get(self.pixels, {})
        if self.pairing == "confusion":
            own = own | CONFUSION_DEFAULTS
        return own if self._gains_from_mixed_statistics else own | RUNNING_STATISTICS

    @property
    def _gains_from_mixed_statistics(self) -> bool:
        """As far as was measured (results/README.md)."""
        if self.architecture != "plain" or self.pixels != "cutmix":
            return False
        return self.pairing == "index" or (self.pairing == "transport" and base_name(self) == "ce")

    def adjusted(self, protocol: Protocol) -> Protocol:
        """The protocol with this method's own defaults."""
        changed: dict[str, Any] = {name: value for name, (value, _) in self.defaults.items()}
        if self.pairing == "confusion" and protocol.confusion_from != "streamed":
            del changed["confusion_from"]
        return replace(protocol, **changed)

    def protocol(self, name: ProtocolName, overrides: Overrides | None = None) -> Protocol:
        """The settings this method runs with. Raises UserError where a value is out of range."""
        return resolve(name, overrides, self.adjusted)

    @property
    def set_by_schedule(self) -> tuple[str, ...]:
        """Part settings whose default is a share of the run that the learning-rate schedule knows."""
        late = ("rebalancing.start",) if self.rebalancing in ("drw", "drs") else ()
        return (*late, "model.temperature_start") if self.architecture == "ride" else late

    def effective(
        self, name: ProtocolName, overrides: Overrides | None = None, deferred: float | None = None
    ) -> dict[str, Any]:
        """Every setting of this method by its key, at the value it runs with.

        `deferred` is the value of `set_by_schedule`, which are left out where neither it nor a value is given. One of a
        part may be None where that was asked for. Raises
        UserError for a value that its setting cannot have.
        """
        overrides = self.converted(overrides or Overrides())
        protocol = self.protocol(name, overrides)
        usual = {key: setting.default for key, setting in self.part_settings.items()}
        usual |= dict.fromkeys(self.set_by_schedule, deferred)
        parts = usual | {key: value for key, value in overrides.parts.items() if key in usual}
        values = {key: getattr(protocol, key) for key in self.setting_names} | parts
        return {key: value for key, value in values.items() if value is not None or key in overrides.parts}

    def settings(self, protocol: Protocol) -> Iterator[tuple[str, object, str, str]]:
        """Each setting of a protocol that matters here: name, value under `protocol`, meaning, source."""
        adjusted = self.adjusted(protocol)
        for f in fields(Protocol):
            if f.name in self.setting_names:
                own = f.name in self.defaults and getattr(adjusted, f.name) == self.defaults[f.name][0]
                source = self.defaults[f.name][1] if own else f.metadata["why"]
                yield f.name, getattr(adjusted, f.name), f.metadata["meaning"], source


def base_name(method: Method) -> str:
    """The loss and its rebalancing: `ldam-drw`."""
    return method.loss + (f"-{method.rebalancing}" if method.rebalancing else "")


def _split(mixer: str) -> tuple[PairingName, str]:
    """Pairing and pixel rule of a mixer's name."""
    first, _, rest = mixer.partition("-")
    return (PAIRINGS[first], rest or "cutmix") if first in PAIRINGS else ("within-batch", mixer)


# The tables of losses and pixel rules need torch, so they are imported when a name is looked up.


def _loss(name: str) -> Callable[..., Any]:
    from otmix.losses import LOSSES

    return LOSSES[name]


def _pixel_rule(name: str) -> Callable[..., Any]:
    from otmix.mixing import PIXEL_RULES

    return PIXEL_RULES[name]


def _architecture(name: Architecture) -> tuple[Callable[..., Any], ...]:
    if name != "ride":
        return ()
    from otmix.losses import RIDE

    return (experts, RIDE)


def experts(experts: int = 3) -> int:
    """How many experts RIDE has.

    Args:
        experts: how many experts, 1 to 8 (RIDE: 2 to 4; the paper's tables: 3).
    """
    return experts


def _rebalancing(name: str | None) -> tuple[Callable[..., Any], ...]:
    from otmix.losses import DeferredReweighting
    from otmix.sampling import ClassSampling

    return {None: (), "drw": (DeferredReweighting,)}.get(name, (ClassSampling,))


def loss_part(name: str) -> Part:
    """What listings say of a loss."""
    if name in LOSS_PARTS:
        return LOSS_PARTS[name]
    from otmix.losses import LOSSES

    return _own_part(LOSSES.get(name), name, "a loss of one's own")


def mixer_part(name: str) -> Part:
    """What listings say of a mixer: "OTmix (Mixup)" for otmix-mixup."""
    first, _, rest = name.partition("-")
    if first not in PAIRINGS:
        return _pixel_part(name)
    pairing = PAIRING_PARTS[first]
    if not rest:
        return pairing
    pixels = _pixel_part(rest)
    return Part(
        f"{pairing.title} ({pixels.title})",
        f"{pairing.paper}; {pixels.paper}",
        f"{pairing.changes}, by {pixels.title}",
        (*pairing.disagrees, *pixels.disagrees),
    )


def _pixel_part(name: str) -> Part:
    if name in PIXEL_PARTS:
        return PIXEL_PARTS[name]
    from otmix.mixing import PIXEL_RULES

    return _own_part(PIXEL_RULES.get(name), name, "a pixel rule of one's own")


def _own_part(of: object, name: str, changes: str) -> Part:
    """What a class says of itself, by attributes that it need not have."""
    return Part(
        getattr(of, "title", name),
        getattr(of, "paper", "registered from outside"),
        getattr(of, "changes", changes),
        getattr(of, "disagrees", ()),
    )
