"""Names, protocols, schedules and configurations."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
import torch
from rich.console import Console

from otmix.cli import COMMANDS
from otmix.cli.help import page
from otmix.cli.listings import explain_method
from otmix.config import RunConfig, with_defaults
from otmix.errors import UserError
from otmix.inference import evaluate_run
from otmix.losses import LOSSES, Criterion
from otmix.losses.ib import ib_steps
from otmix.methods import ALIASES, LOSS_PARTS, all_methods, check_settings, known_losses, known_mixers, parse_method
from otmix.protocols import PROTOCOLS, Overrides, Protocol, ProtocolName, resolve
from otmix.settings import Setting
from otmix.training import open_run, train
from otmix.training.schedules import Schedule, ScheduleName
from otmix.types import ClassCounts


def test_every_method_is_found_by_its_name() -> None:
    methods = all_methods()
    assert len({method.name for method in methods}) == len(methods)
    for method in methods:
        assert parse_method(method.name) == method
        assert parse_method(method.name.upper()) == method
        assert parse_method(method.title) == method


@pytest.mark.parametrize(
    ("alias", "name", "title"),
    [
        ("erm", "ce", "ERM"),
        ("cmo", "ce+cmo", "ERM + CMO"),
        ("otmix", "ce+otmix", "ERM + OTmix"),
        ("drw", "ce-drw", "ERM-DRW"),
        ("drw+otmix", "ce-drw+otmix", "ERM-DRW + OTmix"),
        ("erm+otmix", "ce+otmix", "ERM + OTmix"),
        ("mixup", "ce+mixup", "ERM + Mixup"),
        ("erm+otmix-mixup", "ce+otmix-mixup", "ERM + OTmix (Mixup)"),
        ("otmix-cutmix", "ce+otmix", "ERM + OTmix"),
        ("balms-drs+cmo-saliencymix", "balanced-softmax-drs+cmo-saliencymix", "BALMS-DRS + CMO (SaliencyMix)"),
        ("ride", "ride-ldam-drw", "RIDE"),
        ("ride+otmix", "ride-ldam-drw+otmix", "RIDE + OTmix"),
        ("ride-balms", "ride-balanced-softmax", "RIDE (BALMS)"),
        ("bbn", "bbn-ce", "BBN"),
        ("bayias+unimix", "bayias+unimix", "Bayias + UniMix"),
        ("ce-cbs", "ce-cbs", "ERM-CBS"),
        ("BALMS + OTmix", "balanced-softmax+otmix", "BALMS + OTmix"),
        (" erm-DRW  +otmix ", "ce-drw+otmix", "ERM-DRW + OTmix"),
        ("LDAM-DRW+OTmix", "ldam-drw+otmix", "LDAM-DRW + OTmix"),
        ("CB Softmax", "cb-softmax", "CB Softmax"),
        ("ride (balms) + OTmix (Mixup)", "ride-balanced-softmax+otmix-mixup", "RIDE (BALMS) + OTmix (Mixup)"),
        ("ride-drw", "ride-ce-drw", "RIDE (ERM-DRW)"),
    ],
)
def test_aliases(alias: str, name: str, title: str) -> None:
    assert parse_method(alias).name == name
    assert parse_method(alias).title == title


@pytest.mark.parametrize(
    "name",
    [
        "otmx",
        "ce+",
        "cmo+otmix",
        "otmix+otmix",
        "",
        "ce-drw-drw",
        "+ce",
        "ride-",
        "ce+otmix-otmix",
        "ce+cmo-",
        "mixup+cmo",
        "bbn-ride-ce",
    ],
)
def test_unknown_names_are_refused_with_a_hint(name: str) -> None:
    with pytest.raises(UserError, match=r"no method named .*(did you mean|a name is)"):
        parse_method(name)
    assert "otmix" in ALIASES


@pytest.mark.parametrize("name", ["bbn+otmix", "bbn-ldam-drw+mixup"])
def test_bbn_with_a_mixer_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(UserError, match=r"BBN takes no mixer, since its two branches already use up both streams; use"):
        parse_method(name)


def test_every_loss_combines_with_every_mixer() -> None:
    names = {method.name for method in all_methods()}
    assert {f"{loss}+{mixer}" for loss in known_losses() for mixer in known_mixers()} <= names
    assert len(known_mixers()) == 5 + 3 * 5


def test_every_setting_of_a_protocol_has_a_meaning_a_source_and_an_override() -> None:
    names = [f.name for f in fields(Protocol)]
    assert [*names, "parts"] == [f.name for f in fields(Overrides)]
    read = {setting for name in ("drw+otmix", "remix") for setting in parse_method(name).setting_names}
    hints, changed = get_type_hints(Protocol), get_type_hints(Overrides)
    for f in fields(Protocol):
        assert f.metadata["meaning"]
        assert f.metadata["why"]
        assert changed[f.name] == hints[f.name] | None
        assert f.name in read


def test_the_table_of_design_section_5() -> None:
    paper, official, clean = PROTOCOLS["paper"], PROTOCOLS["official"], PROTOCOLS["clean"]
    assert (paper.mix_probability, official.mix_probability, clean.mix_probability) == (1, 0.5, 0.5)
    assert (paper.mix_from, paper.mix_until) == (0, 1)
    assert (official.mix_from, official.mix_until) == (4 / 240, 237 / 240)
    assert (clean.mix_from, clean.mix_until) == (4 / 240, 237 / 240)
    assert {p.mix_fraction for p in PROTOCOLS.values()} == {1}
    assert (paper.curriculum_per, official.curriculum_per, clean.curriculum_per) == ("batch", "epoch", "batch")
    assert (paper.curriculum_one_based, official.curriculum_one_based) == (True, False)
    assert (paper.foreground_r, official.foreground_r, clean.foreground_r) == (1, 0, 0)
    assert (paper.box, official.box) == ("exact", "clipped")
    assert (paper.features, official.features, clean.features) == ("pooled", "official", "pooled")
    assert (paper.confusion_from, official.confusion_from, clean.confusion_from) == ("held-out", "test", "streamed")
    assert (paper.confusion_soft, official.confusion_soft, clean.confusion_soft) == (False, False, True)
    assert {(p.epsilon, p.omega, p.alpha) for p in PROTOCOLS.values()} == {(0.01, 0.05, 4)}
    assert (paper.weighted_mean, official.weighted_mean, clean.weighted_mean) == (
        "mean", "weighted-mean", "weighted-mean",
    )  # fmt: skip
    assert (paper.headline, official.headline, clean.headline) == ("last", "best-on-test", "last")
    assert [name for name, p in PROTOCOLS.items() if p.looks_at_test] == ["official"]


@pytest.mark.parametrize(
    ("settings", "looks"),
    [
        (Overrides(confusion_from="test"), True),
        (Overrides(headline="best-on-test"), True),
        (Overrides(confusion_from="validation"), False),
    ],
)
def test_either_look_at_the_test_set_is_one(settings: Overrides, looks: bool) -> None:
    assert resolve("clean", settings).looks_at_test == looks


def test_overrides_change_single_settings() -> None:
    changed = resolve("paper", Overrides(alpha=1.0, keep_diagonal=True))
    assert changed == replace(PROTOCOLS["paper"], alpha=1.0, keep_diagonal=True)


@pytest.mark.parametrize(
    "bad", [{"epsilon": 0.0}, {"epsilon": 1e-50}, {"omega": 2.0}, {"alpha": -1.0}, {"confusion_per_class": 0}]
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        resolve("clean", Overrides(**bad))  # type: ignore[arg-type]


OUT_OF_RANGE: list[tuple[str, dict[str, object], str]] = [
    ("otmix", {"mix_from": 1.5}, "mix_from is a share"),
    ("otmix", {"mix_until": -0.1}, "mix_until is a share"),
    ("otmix", {"mix_from": 0.5, "mix_until": 0.3}, "mix_from 0.5 lies above mix_until 0.3"),
    ("otmix", {"mix_from": 1.0}, "mix_from 1 lies above mix_until 0.9875"),
    ("otmix", {"curriculum_power": -1}, "curriculum_power must be 0 or more, it is -1"),
    ("otmix", {"curriculum_power": math.nan}, "curriculum_power must be 0 or more, it is nan"),
    ("cmo", {"foreground_r": math.nan}, "foreground_r must be a finite number, it is nan"),
    ("cmo", {"foreground_r": math.inf}, "foreground_r must be a finite number, it is inf"),
    ("focal", {"loss.gamma": -1}, "gamma of at least 0"),
    ("ride-focal+cmo", {"loss.gamma": -1}, "gamma of at least 0"),
    ("remix", {"mixer.kappa": 0.5}, "kappa of Remix"),
    ("otmix-remix", {"mixer.kappa": 0.5}, "kappa of Remix"),
    ("ride", {"model.experts": 99}, "1 to 8 experts"),
    ("ride", {"model.rho": 2}, "a rho and a temperature_start from 0 to 1"),
    ("ce-drw", {"rebalancing.start": 7}, "start of re-weighting"),
    ("ce-drs", {"rebalancing.start": 7}, "start of re-sampling"),
]


@pytest.mark.parametrize(("method", "given", "message"), OUT_OF_RANGE)
def test_settings_out_of_range_are_refused_before_anything_is_read(
    method: str, given: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Overrides.from_dict(given)
    with pytest.raises(UserError, match=message):
        check_settings(settings, "clean", [method])
    monkeypatch.setattr("otmix.training.run.load_data", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(UserError, match=message):
        train(RunConfig(method=method, set=settings, accelerator="cpu", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_ends_of_the_ranges_are_taken() -> None:
    """What a small check cannot know, the counts of the classes, it leaves to the run."""
    for method, given in (
        ("otmix", {"mix_from": 0.0, "mix_until": 1.0, "curriculum_power": 0.0, "foreground_r": -1.0}),
        ("otmix", {"mix_from": 0.5, "mix_until": 0.5}),
        ("unimix", {"mixer.tau": -300.0}),
        ("ride-drw", {"model.experts": 8, "rebalancing.start": 1}),
        ("remix", {"mixer.kappa": math.inf}),
    ):
        check_settings(Overrides.from_dict(given), "clean", [method])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_protocol_sets_may_be_said_too(protocol: ProtocolName) -> None:
    """Every setting of every method, a few of each kind, by itself at its own value."""
    for name in ("otmix", "otmix-remix", "unimix", "ce+confusion", "ride-drw", "ce-srs", "ib-drs", "lade", "bbn"):
        method = parse_method(name)
        for key, value in method.effective(protocol, deferred=0.5).items():
            if key in ("foreground_r", "confusion_per_class"):  # with the law and the source that give them a meaning
                continue
            check_settings(Overrides.from_dict({key: value}), protocol, [name])


def test_a_loss_of_ones_own_that_needs_the_real_classes_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Criterion):
        def __init__(self, counts: ClassCounts, power: float = 1.0) -> None:
            super().__init__(counts)
            if power < 0:
                raise UserError("own needs a power of at least 0")
            self.rare = float((counts.counts.double() - 20).log().min()) / int(counts.counts[40])

    monkeypatch.setitem(LOSSES, "own", Own)
    check_settings(Overrides(parts={"loss.power": 2.0}), "clean", ["own"])
    with pytest.raises(UserError, match="own needs a power"):
        check_settings(Overrides(parts={"loss.power": -2.0}), "clean", ["own"])
    with pytest.raises(UserError, match="start of re-weighting"):
        check_settings(Overrides(parts={"rebalancing.start": 7}), "clean", ["own-drw"])


@pytest.mark.parametrize(
    ("settings", "because"),
    [
        (Overrides(omega=0.0, metric="euclidean"), "metric changes nothing .* omega is 0"),
        (Overrides(omega=1.0, keep_diagonal=True), "keep_diagonal changes nothing .* omega is 1"),
        (Overrides(omega=1.0, confusion_from="train"), "confusion_from changes nothing .* omega is 1"),
        (Overrides(omega=1.0, confusion_noise=0.5), "confusion_noise changes nothing .* omega is 1"),
        (Overrides(confusion_per_class=9), "confusion_per_class changes nothing .* F comes from streamed"),
        (Overrides(confusion_per_class=9, confusion_from="test"), "confusion_per_class .* F comes from test"),
        (Overrides(foreground_law="effective-number", foreground_r=1.0), "foreground_r .* only inverse-frequency"),
        (Overrides(curriculum_power=0.0, curriculum_per="epoch"), "curriculum_per .* curriculum_power is 0"),
        (Overrides(curriculum_power=0.0, curriculum_one_based=False), "curriculum_one_based .* curriculum_power is 0"),
        (Overrides(mix_probability=0.0, alpha=1.0), "alpha .* nothing is mixed"),
        (Overrides(mix_fraction=0.0, box="clipped"), "box .* nothing is mixed"),
        (Overrides(parts={"model.diversity": 0, "model.rho": 0.1}), r"model\.rho .* model\.diversity is 0"),
        (Overrides(parts={"model.experts": "1", "model.diversity": 1.0}), r"model\.diversity .* model\.experts is 1"),
        (Overrides(parts={"loss.start": 1, "loss.scale": 2.0}), r"loss\.scale .* loss\.start is 1"),
        (Overrides(parts={"loss.strength": 0, "loss.regulariser": 1.0}), r"loss\.regulariser .* loss\.strength is 0"),
        (Overrides(parts={"mixer.kappa": math.inf, "mixer.tau": 0.1}), r"mixer\.tau .* mixer\.kappa is inf"),
        (Overrides(parts={"rebalancing.start": 1, "rebalancing.beta": 0.9}), r"rebalancing\.beta .*start is 1"),
        (Overrides(parts={"rebalancing.start": 1}, weighted_mean="mean"), r"weighted_mean .*start is 1"),
    ],
)
def test_settings_that_others_make_idle_are_refused(settings: Overrides, because: str) -> None:
    with pytest.raises(UserError, match=because):
        check_settings(settings, "clean", ["erm", "otmix", "ride", "ib", "lade", "remix", "ldam-drw"])


TRANSPORT_IDLE_UNMIXED: dict[str, object] = {
    "features": "official",
    "omega": 0.2,
    "metric": "euclidean",
    "keep_diagonal": True,
    "epsilon": 0.1,
    "select": "softmax",
    "curriculum_power": 2.0,
    "curriculum_per": "epoch",
    "curriculum_one_based": False,
    "confusion_from": "train",
    "confusion_soft": False,
    "confusion_run": "run",
    "confusion_shuffle": 0.5,
    "confusion_noise": 0.5,
    "mix_fraction": 0.5,
    "foreground_r": 1.0,
    "alpha": 1.0,
}
IDLE_PAIRS: list[tuple[str, dict[str, object], str, str]] = [
    *(
        ("otmix", {"mix_probability": 0.0, name: value}, name, "nothing is mixed: mix_probability is 0")
        for name, value in TRANSPORT_IDLE_UNMIXED.items()
    ),
    ("otmix", {"mix_probability": 0.0, "mix_from": 0.5}, "mix_from", "mix_probability is 0"),
    ("otmix", {"mix_from": 0.5, "mix_until": 0.5, "mix_probability": 1.0}, "mix_probability", "mix_from is mix_until"),
    ("otmix", {"mix_from": 0.5, "mix_until": 0.5, "omega": 0.2}, "omega", "mix_from is mix_until"),
    *(
        ("otmix", {"mix_fraction": 0.0, name: value}, name, "nothing is mixed: mix_fraction is 0")
        for name, value in TRANSPORT_IDLE_UNMIXED.items()
        if name not in ("features", "mix_fraction")
    ),
    ("otmix", {"mix_fraction": 0.0, "mix_probability": 1.0}, "mix_probability", "mix_fraction is 0"),
    ("otmix", {"mix_fraction": 0.0, "features": "official", "alpha": 1.0}, "alpha", "mix_fraction is 0"),
    ("otmix", {"mix_fraction": 0.0, "features": "official", "omega": 0.2}, "omega", "mix_fraction is 0"),
    ("remix", {"mix_probability": 0.0, "mixer.kappa": 2.0}, "mixer.kappa", "mix_probability is 0"),
    ("otmix-remix", {"mix_probability": 0.0, "mixer.tau": 0.2}, "mixer.tau", "mix_probability is 0"),
    ("unimix", {"mix_fraction": 0.0, "mixer.tau": -0.1}, "mixer.tau", "mix_fraction is 0"),
    ("ce+confusion", {"mix_probability": 0.0, "confusion_from": "train"}, "confusion_from", "mix_probability is 0"),
    ("remix", {"mixer.tau": 0, "mixer.kappa": 2.0}, "mixer.kappa", "mixer.tau is 0"),
    ("ce-drw", {"rebalancing.beta": 0, "rebalancing.start": 0.5}, "rebalancing.start", "rebalancing.beta is 0"),
    ("ce-drw", {"rebalancing.beta": 0, "weighted_mean": "mean"}, "weighted_mean", "rebalancing.beta is 0"),
    *(
        (f"ce-{law}", {f"rebalancing.{idle}": 0.5, f"rebalancing.{cause}": 1}, f"rebalancing.{idle}", f"{cause} is 1")
        for law in ("drs", "cbs", "srs")
        for idle, cause in (("power", "start"), ("start", "power"))
    ),
    ("logit-adjustment", {"loss.tau": 0, "loss.post_hoc": True}, "loss.post_hoc", "loss.tau is 0"),
    ("ride", {"model.rho": 0, "model.temperature_start": 0.5}, "model.temperature_start", "model.rho is 0"),
    ("ride", {"model.temperature_start": 1, "model.rho": 0.1}, "model.rho", "model.temperature_start is 1"),
]


@pytest.mark.parametrize(("method", "given", "idle", "because"), IDLE_PAIRS)
def test_each_pair_of_settings_of_which_one_is_idle(
    method: str, given: dict[str, object], idle: str, because: str
) -> None:
    """Either alone is taken where it has an effect alone; together the idle one is refused."""
    with pytest.raises(UserError, match=rf"^--set\.{idle} changes nothing for .*, because .*{because}"):
        check_settings(Overrides.from_dict(given), "clean", [method])
    check_settings(Overrides.from_dict({idle: given[idle]}), "clean", [method])
    check_settings(Overrides.from_dict({key: given[key] for key in given if key != idle}), "clean", [method])


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("RIDE (3 experts)", "ride"),
        ("RIDE (3 experts) + OTmix", "ride+otmix"),
        ("RIDE (3 experts) + CMO", "ride+cmo"),
        ("ResNet-32 (baseline)", "erm"),
        ("+ Mixup", "ce+mixup"),
        ("+ Cutmix", "ce+cutmix"),
        ("+ SaliencyMix", "ce+saliencymix"),
        ("+ OTmix (Mixup)", "otmix-mixup"),
        ("+ OTmix (Cutmix)", "otmix"),
        ("+ OTmix (SaliencyMix)", "otmix-saliencymix"),
    ],
)
def test_rows_of_the_papers_tables_are_names(title: str, name: str) -> None:
    assert parse_method(title) == parse_method(name)


def test_settings_of_parts_may_be_nested_in_python_too() -> None:
    nested = RunConfig.from_dict({"method": "focal", "set": {"loss": {"gamma": 2}}})
    assert nested == RunConfig(method="focal", set=Overrides(parts={"loss.gamma": 2}))
    with pytest.raises(UserError, match=r"unknown setting set\.losss"):
        RunConfig.from_dict({"set": {"losss": 2}})


def test_a_number_of_experts_in_a_title_is_a_setting_of_the_run() -> None:
    with pytest.raises(UserError, match=r"give ride\+otmix and --set.model.experts 4"):
        parse_method("RIDE (4 experts) + OTmix")
    run = RunConfig(method="RIDE (4 experts) + OTmix", set=Overrides(alpha=1.0))
    asked = RunConfig(method="ride+otmix", set=Overrides(alpha=1.0, parts={"model.experts": 4}))
    assert run == asked
    assert RunConfig(method="RIDE (3 experts)").identity == RunConfig(method="ride").identity
    assert RunConfig.from_dict({"method": "RIDE (2 experts)"}).set.parts == {"model.experts": 2}
    with pytest.raises(UserError, match=r"has 4 experts, --set\.model\.experts says 2; leave one of them out"):
        RunConfig(method="RIDE (4 experts)", set=Overrides(parts={"model.experts": 2}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metric", "euclidian"),
        ("features", "offical"),
        ("select", "argmx"),
        ("curriculum_per", "step"),
        ("foreground_law", "uniform"),
        ("headline", "best"),
        ("confusion_from", "val"),
        ("weighted_mean", "weighted_mean"),
        ("confusion_soft", "maybe"),
        ("alpha", "four"),
        ("alpha", True),
        ("confusion_per_class", 2.5),
    ],
)
def test_misspelt_settings_are_refused_from_python_too(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"--set\.{name} must be .*, it is {value}"):
        Overrides(**{name: value})  # type: ignore[arg-type]


def test_settings_have_one_type_however_they_are_written() -> None:
    written = Overrides(alpha="2", keep_diagonal="no", confusion_per_class="3", epsilon=1)  # type: ignore[arg-type]
    assert written == Overrides(alpha=2.0, keep_diagonal=False, confusion_per_class=3, epsilon=1.0)
    assert RunConfig(set={"alpha": 2, "loss.tau": 1}) == RunConfig(  # type: ignore[arg-type]
        set=Overrides(alpha=2.0, parts={"loss.tau": 1})
    )


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (Overrides(omega=0.0, keep_diagonal=True, confusion_noise=0.5), "otmix"),
        (Overrides(omega=1.0, metric="euclidean", features="official"), "otmix"),
        (Overrides(omega=0.0, features="official"), "otmix"),
        (Overrides(foreground_r=1.0), "otmix"),
        (Overrides(parts={"model.diversity": 0, "model.experts": 4}), "ride"),
        (Overrides(parts={"rebalancing.start": 0.5, "rebalancing.beta": 0.9}), "drw"),
        (Overrides(confusion_from="held-out", confusion_per_class=9), "otmix"),
        (Overrides(confusion_from="balanced-train", confusion_per_class=9), "otmix"),
        (Overrides(confusion_from="train", confusion_noise=0.5), "ce+confusion"),
        (Overrides(alpha=1.0), "cmo"),
        (Overrides(mix_probability=0.0, headline="best-on-test"), "otmix"),
        (Overrides(mix_probability=0.0, weighted_mean="mean"), "ce-drw+otmix"),
        # the passes of "official" move BatchNorm's statistics, of foregrounds too
        (Overrides(mix_fraction=0.0, features="official", mix_probability=1.0, curriculum_power=2.0), "otmix"),
        (Overrides(mix_fraction=0.0, features="official", mix_from=0.5, foreground_r=1.0), "otmix"),
        (Overrides(parts={"rebalancing.start": 0.5, "rebalancing.power": 0.5}), "ce-drs"),
        (Overrides(parts={"model.rho": 0.1, "model.temperature_start": 0.5}), "ride"),
        (Overrides(parts={"loss.tau": 2, "loss.post_hoc": True}), "logit-adjustment"),
        # those of the paper's tables 4, 7 and 8 and its figure 8
        *((Overrides(mix_fraction=share), "otmix") for share in (0.25, 0.5, 0.75)),
        *((Overrides(omega=omega), "otmix") for omega in (0.0, 0.05, 0.5, 1.0)),
        *((Overrides(curriculum_power=power), "otmix") for power in (0.0, 0.5, 1.0, 3.0)),
        *((Overrides(select=select), "otmix") for select in ("sample", "softmax")),
        (Overrides(keep_diagonal=True, metric="euclidean"), "otmix"),
        (Overrides(confusion_run="run", confusion_from="held-out"), "ce+confusion"),
        (Overrides(confusion_run="run", confusion_from="train"), "otmix"),
    ],
)
def test_settings_that_have_an_effect_are_taken(settings: Overrides, method: str) -> None:
    check_settings(settings, "clean", [method])


@pytest.mark.parametrize(
    ("images", "size"), [(1, 16), (180, 16), (511, 16), (512, 32), (1500, 64), (2047, 64), (2048, 128), (10**6, 128)]
)
def test_small_folders_get_small_batches(images: int, size: int) -> None:
    filled = with_defaults(RunConfig(data="folder"), small=True, backbone="resnet32", image_size=32, images=images)
    assert (filled.batch_size, filled.lr) == (size, 0.1 * size / 128)
    asked = replace(RunConfig(data="folder"), batch_size=64, lr=0.3)
    filled = with_defaults(asked, small=True, backbone="resnet32", image_size=32, images=images)
    assert (filled.batch_size, filled.lr) == (64, 0.3)
    large = with_defaults(RunConfig(data="folder"), small=False, backbone="timm/x", image_size=224, images=images)
    assert (large.batch_size, large.lr) == (min(32, size), 1e-4)
    cifar = with_defaults(RunConfig(data="cifar10"), small=True, backbone="resnet32", image_size=32, images=images)
    assert (cifar.batch_size, cifar.lr) == (128, 0.1)


def test_shot_groups_are_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet-LT's scripts count a class of 20 images as few-shot. At its default it changes no run's name."""
    assert "few_below" not in RunConfig().identity
    assert RunConfig(few_below=21).hash != RunConfig().hash
    with pytest.raises(UserError, match="--few-below 102 and --many-above 100 overlap"):
        RunConfig(few_below=102)
    monkeypatch.setattr("otmix.training.outcome.draw_pictures", lambda run, plan: None)
    config = RunConfig(method="erm", max_per_class=40, epochs=1, accelerator="cpu", out=str(tmp_path / "run"))
    run = open_run(train(replace(config, many_above=39, few_below=3)))
    counts, found = run.counts.counts, run.result["evaluation"]
    assert (int(counts.max()), int(counts.min())) == (40, 2)
    said = np.load(run.run_dir / "predictions.npz")
    wrong = torch.from_numpy(said["probabilities"].argmax(1) != said["labels"])
    for name, members in (("many", counts > 39), ("few", counts < 3)):
        of_group = members[torch.from_numpy(said["labels"])]
        assert found["group_error"][name] == pytest.approx(float(wrong[of_group].double().mean()), abs=0.01)
    assert evaluate_run(run.run_dir)["group_error"] == found["group_error"]


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="clean, paper, official"):
        resolve("papr")  # type: ignore[arg-type]


def test_the_papers_steps() -> None:
    schedule = Schedule("steps")
    factors = [schedule.factor(epoch, 240) for epoch in range(240)]
    assert factors == [1.0] * 100 + [0.1] * 60 + [0.01] * 40 + [0.0001] * 40


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        ("imagenet-lt", 200, [1.0] * 40 + [0.1] * 40 + [0.01] * 80 + [0.0001] * 40),
        ("inaturalist", 210, [1.0] * 30 + [0.1] * 50 + [0.01] * 50 + [0.001] * 50 + [0.0001] * 30),
        ("bbn", 200, [1.0] * 119 + [0.01] * 40 + [0.0001] * 41),
    ],
)
def test_the_steps_of_others(name: ScheduleName, epochs: int, expected: list[float]) -> None:
    schedule = Schedule.named(name)
    assert [schedule.factor(epoch, epochs) for epoch in range(epochs)] == expected
    assert RunConfig(schedule=name).schedule == name


def test_every_schedule_can_be_asked_for() -> None:
    assert get_args(get_args(get_type_hints(RunConfig)["schedule"])[0]) == get_args(ScheduleName)


def test_the_steps_of_ldams_code() -> None:
    schedule = Schedule.named("ldam", warmup=5 / 200)
    factors = [schedule.factor(epoch, 200) for epoch in range(200)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 156, *[0.01] * 20, *[0.0001] * 20])
    assert (schedule.deferred, Schedule.named("steps").deferred) == (160 / 200, 160 / 240)
    config = with_defaults(RunConfig(schedule="ldam"), small=True, backbone="resnet8", image_size=8)
    assert config.warmup == 5 / 200
    assert with_defaults(RunConfig(), small=True, backbone="resnet8", image_size=8).warmup == 0


# of the released ImageNet-LT and iNaturalist scripts, and of BBN's code, which steps its scheduler before each epoch
# and so begins at 7/15 instead of 1/3; no source speaks of deferred re-weighting in BBN, where it begins as in LDAM
LDAMS_WARMUP = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "epochs", "deferred", "first"),
    [
        ("steps", 240, 160, [1.0] * 6),
        ("cosine", 240, 160, None),
        ("ldam", 200, 160, LDAMS_WARMUP),
        ("imagenet-lt", 200, 80, LDAMS_WARMUP),
        ("inaturalist", 210, 160, LDAMS_WARMUP),
        ("bbn", 200, 160, [7 / 15, 9 / 15, 11 / 15, 13 / 15, 1.0, 1.0]),
    ],
)
def test_each_schedule_warms_up_and_defers_as_its_source_does(
    name: ScheduleName, epochs: int, deferred: int, first: list[float] | None
) -> None:
    config = with_defaults(RunConfig(schedule=name), small=True, backbone="resnet8", image_size=8)
    assert config.warmup is not None
    schedule = Schedule.named(name, config.warmup)
    assert schedule.deferred == deferred / epochs
    assert config.warmup == (0.0 if name in ("steps", "cosine") else 5 / epochs)
    if first is not None:
        assert [schedule.factor(epoch, epochs) for epoch in range(6)] == pytest.approx(first)
    # what is asked for counts
    asked = with_defaults(RunConfig(schedule=name, warmup=0.0), small=True, backbone="resnet8", image_size=8)
    assert asked.warmup == 0.0


def test_the_help_says_how_each_schedule_warms_up() -> None:
    said = page("train", COMMANDS["train"])
    text = " ".join(said[said.index("--warmup") :].split())
    assert "default 0; 5 of 200 epochs with ldam, bbn and imagenet-lt, 5 of 210 with inaturalist" in text


def test_listings_say_when_each_schedule_defers(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ce-drw", "ce-drs", "ride"):
        explain_method(parse_method(name), Console(width=100), ["clean"])
        text = " ".join(capsys.readouterr().out.split())
        assert text.count("160 of 200 with ldam and bbn, 80 of 200 with imagenet-lt, 160 of 210 with inaturalist") >= 1


def test_a_loss_may_bring_its_own_steps() -> None:
    schedule = Schedule.named("steps", own_steps=((0.5, 0.01), (0.8, 1e-4), (0.9, 1e-6)))
    factors = [schedule.factor(epoch, 10) for epoch in range(10)]
    assert factors == [1, 1, 1, 1, 1, 0.01, 0.01, 0.01, 1e-4, 1e-6]
    assert Schedule.named("cosine", own_steps=((0.5, 0.01),)) == Schedule("cosine")


def test_what_the_listing_says_of_ibs_steps_holds_for_every_schedule() -> None:
    assert "the learning rate steps are its code's with every --schedule but cosine" in LOSS_PARTS["ib"].changes
    for name in get_args(ScheduleName):
        theirs = Schedule.named(name, own_steps=ib_steps(0.5))
        assert (theirs.milestones == (0.5, 160 / 200, 180 / 200)) == (name != "cosine"), name


def test_warmup_of_ldams_code() -> None:
    schedule = Schedule("steps", warmup=5 / 200)
    assert [schedule.factor(epoch, 200) for epoch in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_falls_from_one_to_nearly_zero_and_warms_up_by_the_step() -> None:
    schedule = Schedule("cosine", warmup=0.1)
    steps = [schedule.factor(e, 20, s, 10) for e in range(20) for s in range(10)]
    assert steps[:20] == sorted(steps[:20])
    assert steps[20:] == sorted(steps[20:], reverse=True)
    assert 0 < steps[0] < 0.06
    assert steps[20] == pytest.approx(1.0)
    assert steps[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 17.9 / 18)))


def test_milestones_must_rise() -> None:
    with pytest.raises(UserError, match="rising"):
        Schedule("steps", (0.5, 0.2), (0.1, 0.01))


def test_config_round_trip_and_unknown_keys() -> None:
    config = RunConfig(method="cmo", set=Overrides(alpha=1.0), epochs=3)
    assert RunConfig.from_dict(config.to_dict()) == config
    for bad in ({"epoch": 3}, {"set": {"alhpa": 1}}):
        with pytest.raises(UserError, match="unknown setting"):
            RunConfig.from_dict(bad)


def test_the_hash_knows_what_decides_the_result_and_nothing_else() -> None:
    base = RunConfig()
    for f in fields(RunConfig):
        kind = get_type_hints(RunConfig)[f.name]
        other: object = f"{getattr(base, f.name)}x"
        if f.name in ("out", "resume", "workers", "checkpoint_minutes", "accelerator", "download"):
            same = {
                "out": "x",
                "resume": True,
                "workers": 5,
                "checkpoint_minutes": 1.0,
                "accelerator": "cpu",
                "download": False,
            }
            assert replace(base, **{f.name: same[f.name]}).hash == base.hash
            continue
        if f.name == "set":
            other = Overrides(alpha=1.0)
        elif f.name == "method":
            other = "cmo"
        elif kind in (float, float | None):
            other = 2.5 if f.name in ("imbalance", "lr", "weight_decay") else 0.33
        elif kind in (int, int | None):
            other = 77
        elif kind in (bool, bool | None):
            other = not getattr(base, f.name)
        elif choices := [value for one in (kind, *get_args(kind)) for value in get_args(one) if isinstance(value, str)]:
            other = next(value for value in choices if value != getattr(base, f.name))
        assert replace(base, **{f.name: other}).hash != base.hash, f.name
    assert RunConfig(method="erm").hash == RunConfig(method="ce").hash


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": -1},
        {"lr": float("nan")},
        {"warmup": 1.0},
        {"imbalance": 0.5},
        {"imbalance": float("inf")},
        {"image_size": 1},
        {"weight_decay": -1.0},
        {"weight_decay": float("inf")},
        {"checkpoint_minutes": -1.0},
        {"optimizer": "rmsprop"},
        {"precision": "bf16"},
        {"checkpoint_minutes": float("nan")},
        {"validation_per_class": -1},
        {"test_fraction": 0.0},
        {"test_fraction": 1.0},
        {"max_per_class": 0},
        {"evaluate_every": 0},
        {"devices": -1},
        {"num_nodes": 0},
        {"workers": -1},
    ],
)
def test_impossible_configurations_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "-")):
        RunConfig(**bad)  # type: ignore[arg-type]


def test_the_extremes_are_allowed() -> None:
    RunConfig(weight_decay=0.0, checkpoint_minutes=0.0, validation_per_class=0, imbalance=1.0, warmup=0.0, workers=0)
    RunConfig(checkpoint_minutes=float("inf"))  # no checkpoint within an epoch


def test_defaults_depend_on_the_data() -> None:
    cifar = with_defaults(RunConfig(data="cifar10"), small=True, backbone="resnet32", image_size=32)
    assert (cifar.epochs, cifar.batch_size, cifar.optimizer, cifar.lr, cifar.weight_decay) == (
        240,
        128,
        "sgd",
        0.1,
        2e-4,
    )
    assert cifar.pretrained is False
    large = with_defaults(RunConfig(data="folder"), small=False, backbone="timm/resnet18", image_size=224)
    assert large.pretrained is True
    assert large.optimizer == "adamw"
    for data, small, optimizer, pretrained, lr, weight_decay in (
        ("digits", True, "adamw", None, 1e-3, 0.05),
        ("cifar10", True, "adamw", None, 1e-3, 0.05),
        ("folder", False, "sgd", None, 0.01, 2e-4),
        ("folder", False, "sgd", False, 0.1, 2e-4),
        ("folder", False, "adamw", None, 1e-4, 0.05),
        ("digits", True, "sgd", None, 0.1, 5e-4),
    ):
        config = RunConfig(data=data, optimizer=optimizer, pretrained=pretrained)  # type: ignore[arg-type]
        filled = with_defaults(config, small=small, backbone="resnet8" if small else "timm/resnet18", image_size=8)
        assert (filled.optimizer, filled.lr, filled.weight_decay) == (optimizer, pytest.approx(lr), weight_decay)
    scratch = with_defaults(
        RunConfig(data="folder", pretrained=False, lr=0.5), small=False, backbone="timm/resnet18", image_size=224
    )
    assert (scratch.epochs, scratch.lr) == (100, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 2.5}, r"epochs must be a whole number, it is 2\.5"),
        ({"epochs": True}, "epochs must be a whole number, it is True"),
        ({"batch_size": 32.0}, "batch_size must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"nesterov": "no"}, "nesterov must be True or False, it is 'no'"),
        ({"compile": 1}, "compile must be True or False"),
        ({"lr": "0.1"}, "lr must be a number, it is '0.1'"),
        ({"imbalance": "20"}, "imbalance must be a number"),
        ({"method": 5}, "method must be a text, it is 5"),
        ({"set": {"alfa": 2}}, "there is no setting alfa; did you mean alpha"),
        ({"set": {"loss": {"tau": [1]}}}, None),
    ],
)
def test_values_of_another_type_are_refused_from_python(settings: dict[str, Any], message: str | None) -> None:
    if message is None:  # of a part: its type is known with the method
        assert dict(RunConfig(**settings).set.parts) == {"loss.tau": [1]}
        return
    with pytest.raises(UserError, match=message):
        RunConfig(**settings)


def test_paths_and_numpys_numbers_are_welcome() -> None:
    config = RunConfig(out=Path("a/b"), epochs=np.int64(3), lr=np.float32(0.5), imbalance=50)  # type: ignore[arg-type]
    assert config == RunConfig(out="a/b", epochs=3, lr=0.5, imbalance=50.0)
    assert (type(config.out), type(config.epochs), type(config.lr)) == (str, int, float)
    assert config.hash == RunConfig(out="a/b", epochs=3, lr=0.5, imbalance=50.0).hash


@pytest.mark.parametrize(
    ("kind", "words", "taken", "refused"),
    [
        (Literal[1, 2], "one of 1, 2", {"1": 1, 2: 2}, ["3", "1.0", True, ""]),
        (Literal["auto", 2, None], "one of auto, 2, none", {"auto": "auto", "2": 2, None: None}, ["Auto", 1]),
        (Literal["3", "true"], "one of 3, true", {3: "3", True: "true", "true": "true"}, [2, False]),
        (Literal[True, "maybe"] | None, "one of true, maybe or none", {True: True, "none": None}, ["no", 1]),
    ],
)
def test_a_setting_may_be_one_of_several_values(
    kind: Any, words: str, taken: dict[Any, Any], refused: list[Any]
) -> None:
    setting = Setting("which", kind, None, "")
    assert setting.is_plain
    assert setting.describe() == words
    for given, value in taken.items():
        found = setting.convert(given)
        assert (found, type(found)) == (value, type(value))
    for given in refused:
        with pytest.raises(UserError, match=f"which must be {words}, it is {given}"):
            setting.convert(given)
