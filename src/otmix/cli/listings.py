"""The commands that only show: `data` and `methods`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from otmix.cli.arguments import GROUPS, Only
from otmix.config import RunConfig
from otmix.extensions import import_files
from otmix.protocols import PROTOCOL_TITLES, PROTOCOLS, Protocol, ProtocolName

if TYPE_CHECKING:
    from rich.console import Console

    from otmix.data import ImageDataset
    from otmix.methods import Method

DATA = Only((*GROUPS["data"], "backbone", "many_above", "few_below"))
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_CLASSES = 200
"""With more, the middle of the listing is left out."""


def data(config: Annotated[RunConfig, DATA]) -> int:
    """Show a dataset as training sees it: images per class, imbalance, groups, splits.

    Examples:
        otmix data --data folder --root photos
        otmix data --data cifar100 --imbalance 50
        otmix data --data folder --root photos --backbone timm/vit_tiny_patch16_384
    """
    from otmix.display import reporter_on_stderr, stdout_console
    from otmix.training.setup import load_data

    with reporter_on_stderr() as reporter:
        dataset = load_data(config, reporter.loading)
    show_dataset(dataset, stdout_console(), config.many_above, config.few_below)
    return 0


def show_dataset(dataset: ImageDataset, console: Console, many: int = 100, few: int = 20) -> None:
    """Classes from the largest to the smallest, with bars of proportional length."""
    import torch
    from rich import box
    from rich.table import Table
    from rich.text import Text

    counts, groups = dataset.counts, dataset.counts.shot_groups(many, few)
    group_of = {int(k): name for name, members in groups.items() if members is not None for k in members}
    splits = {name: source for name in ("train", "validation", "test") if (source := dataset.split(name)) is not None}
    sizes = {
        name: torch.bincount(source.labels, minlength=counts.num_classes).tolist() for name, source in splits.items()
    }
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class", overflow="fold")
    for name in splits:
        table.add_column(name, justify="right")
    table.add_column("group")
    table.add_column("training images", no_wrap=True, overflow="crop")
    order = torch.argsort(counts.counts, descending=True, stable=True).tolist()
    largest = int(counts.counts.max())
    # names and numbers come first where the terminal is narrow
    names = min(24, max(len(name) for name in dataset.class_names))
    width = max(6, min(_BAR, console.width - names - 12 * len(splits) - 13))
    for place, k in enumerate(order):
        if len(order) > _MOST_CLASSES and _MOST_CLASSES // 2 <= place < len(order) - _MOST_CLASSES // 2:
            if place == _MOST_CLASSES // 2:
                table.add_row(f"… {len(order) - _MOST_CLASSES:,} more …")
            continue
        bar = Text(_bar(int(counts.counts[k]) / largest, width, console.options.ascii_only), style="blue")
        table.add_row(Text(dataset.class_names[k]), *(f"{sizes[name][k]:,}" for name in splits), group_of[k], bar)
    console.print(table)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    images = ", ".join(f"{len(source):,} {name}" for name, source in splits.items())
    say(f"{dataset.name}: {counts.num_classes:,} classes; images: {images}")
    smallest = int(counts.counts.min())
    say(f"imbalance: {counts.imbalance:.4g} ({largest:,} in the largest class, {smallest:,} in the smallest)")
    meanings = {"many": f"more than {many}", "medium": f"{few} to {many}", "few": f"fewer than {few}"}
    shots = (
        f"{name} ({meanings[name]}) {'–' if members is None else len(members)}" for name, members in groups.items()
    )
    say(f"classes by training images: {', '.join(shots)}")
    kind = "grey" if dataset.channels == 1 else "colour"
    say(f"the model sees {kind} images of {dataset.image_size} x {dataset.image_size} pixels")
    for note in dataset.notes:
        say(note)


def _bar(share: float, width: int, plain: bool = False) -> str:
    """Linear, to an eighth of a character, or to a whole `plain` one; what is not empty is never invisible."""
    if plain:
        return "#" * max(1, round(share * width))
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def methods(name: str | None = None, /, *, protocol: ProtocolName | None = None, imports: list[Path]) -> int:
    """List the methods, or explain one: every setting, its values, meaning and source.

    Args:
        name: a method, e.g. cmo or ce-drw+otmix.
        protocol: show the values of this protocol only.
        imports: Python file to load first, with losses and mixers of your own (`@register_loss`, `@register_mixer`);
            may be given several times.

    Examples:
        otmix methods
        otmix methods drw+otmix
        otmix methods otmix --protocol official
    """
    import_files(imports)
    from otmix.display import stdout_console
    from otmix.methods import parse_method

    console = stdout_console()
    if name is None:
        list_methods(console)
    else:
        explain_method(parse_method(name), console, [protocol] if protocol else list(get_args(ProtocolName)))
    return 0


def list_methods(console: Console) -> None:
    """The parts that names are made of, and the names that have short forms."""
    from rich import box
    from rich.table import Table

    from otmix import methods as m
    from otmix.losses import LOSSES
    from otmix.mixing import PIXEL_RULES

    grammar = "[ride-|bbn-]loss[-drw|-drs|-cbs|-srs][+mixer]"
    console.print(f"A method's name is {grammar}, e.g. ldam-drw+otmix.", markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("part", "title", "paper", "what it changes", "combines with"):
        table.add_column(column, overflow="fold")
    everything = "everything"
    rows: list[tuple[str, m.Part, str]] = [(loss, m.loss_part(loss), everything) for loss in LOSSES]
    rows += [(f"-{name}", part, "every loss, mixer and architecture") for name, part in m.REBALANCING_PARTS.items()]
    rows += [(f"+{name}", m.mixer_part(name), "all but bbn-") for name in PIXEL_RULES]
    others = ", ".join(f"-{name}" for name in PIXEL_RULES if name != "cutmix")
    rows += [(f"+{name}", part, f"all but bbn-; with {others}") for name, part in m.PAIRING_PARTS.items()]
    rows += [
        (f"{name}-", part, "every loss, rebalancing" + (" and mixer" if name == "ride" else "; no mixer"))
        for name, part in m.ARCHITECTURE_PARTS.items()
    ]
    for name, part, partners in rows:
        table.add_row(name, part.title, part.paper, part.changes, partners)
    console.print(table)
    short = ", ".join(f"{alias} = {canonical}" for alias, canonical in m.ALIASES.items())
    console.print(f"short names: {short}", markup=False, highlight=False, soft_wrap=True)
    rest = 'Titles are names too, e.g. "ERM-DRW + OTmix". Where no loss is named it is ce: ride-drw = ride-ce-drw.'
    console.print(rest, markup=False, highlight=False, soft_wrap=True)
    example = m.parse_method("drw+otmix")
    console.print(f"`otmix methods {example.name}` explains {example.title}.", markup=False, highlight=False)


def explain_method(method: Method, console: Console, protocols: list[ProtocolName]) -> None:
    """One block for each setting: values side by side, then what it means and where it comes from."""
    from rich.text import Text

    def say(text: str, style: str = "", indent: int = 0) -> None:
        margin = " " * indent
        lines = textwrap.wrap(text, min(console.width, 120), initial_indent=margin, subsequent_indent=margin)
        console.print(Text("\n".join(lines), style=style))

    say(f"{method.name}: {method.title}", "bold")
    for part in method.parts:
        say(f"{part.title} ({part.paper}): {part.changes}", indent=2)
    say("")
    disagreements = [sentence for part in method.parts for sentence in part.disagrees]
    if disagreements:
        say("where papers and codes disagree", "bold", indent=2)
        for sentence in disagreements:
            say(sentence, indent=4)
        say("")
    for name in protocols:
        say(PROTOCOL_TITLES[name], indent=2)
    say("")
    rows = [*_setting_rows(method, protocols)]
    header = ["setting", *protocols]
    widths = [max(len(cell) for cell in column) for column in zip(header, *(values for values, _, _ in rows))]
    console.print(Text(_columns(header, widths), style="bold underline"))
    for values, meaning, source in rows:
        differs = len(set(values[1:])) > 1
        console.print(Text(_columns(values, widths), style="bold yellow" if differs else "bold"))
        say(meaning, indent=4)
        say(source, "dim", indent=4)
    for key, setting in method.part_settings.items():
        console.print(Text(f"{key}  {_plain(setting.default)}", style="bold"))
        say(setting.meaning, indent=4)
        if setting.source:
            say(setting.source, "dim", indent=4)


def _columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)).rstrip()


def _setting_rows(method: Method, protocols: list[ProtocolName]) -> Iterator[tuple[list[str], str, str]]:
    by_protocol = [
        {name: value for name, value, _, _ in method.settings(PROTOCOLS[protocol])} for protocol in protocols
    ]
    for name, _, meaning, source in method.settings(Protocol()):
        yield [name, *(_plain(values[name]) for values in by_protocol)], meaning, source


def _plain(value: object) -> str:
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )
