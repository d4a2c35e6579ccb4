"""The help pages, laid out for the eye: what a command does, its flags in groups, examples."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping

from otmix.cli.arguments import REQUIRED, Argument, arguments_of, config_parameter, describe

_INDENT = 28


def overview(commands: Mapping[str, Callable[..., object]], version: str) -> str:
    """`otmix --help`."""
    lines = [
        f"otmix {version}: image classifiers for long-tailed data, with OTmix (Gao et al., NeurIPS 2023)",
        "",
        "usage: otmix COMMAND ...",
        "",
        "commands:",
        *(f"  {name:<12} {first_line(function)}" for name, function in commands.items()),
        "",
        "`otmix COMMAND --help` explains one.",
        "",
        "examples:",
        "  otmix train                                  OTmix on the digits: no download, about a minute",
        "  otmix train --data folder --root photos      your own images, one folder for each class",
        "  otmix compare erm cmo otmix --seeds 3        one table of what the methods are worth",
    ]
    return "\n".join(lines) + "\n"


def first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def page(command: str, function: Callable[..., object]) -> str:
    """`otmix COMMAND --help`."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    arguments = arguments_of(function)
    text, _, examples = describe(function)
    lines = [_usage(command, arguments), ""]
    for paragraph in text.split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width), ""]
    for title in dict.fromkeys(argument.group for argument in arguments):
        lines += [
            f"{title}:",
            *_rows([row for argument in arguments if argument.group == title for row in _row(argument)], width),
            "",
        ]
    if config_parameter(function):
        rows = [
            (
                "--config FILE",
                "YAML file with any of these settings; flags win over it; that of a run is RUN/config.yaml",
            ),
            ("--print_config", "print the settings as YAML and stop"),
        ]
        lines += ["configuration:", *_rows(rows, width), ""]
        lines += ["Defaults are in [brackets]; where there is none, it depends on the data or is off.", ""]
    if examples:
        lines += ["examples:", *(f"  {line}" for line in examples.splitlines())]
    return "\n".join(lines).rstrip() + "\n"


def _usage(command: str, arguments: Iterable[Argument]) -> str:
    words = [f"usage: otmix {command}"]
    for argument in arguments:
        if argument.positional:
            words.append(
                f"{argument.metavar} ..."
                if argument.several
                else argument.metavar
                if argument.default is REQUIRED
                else f"[{argument.metavar}]"
            )
    return " ".join([*words, "[flags]"])


def _row(argument: Argument) -> Iterator[tuple[str, str]]:
    if argument.key.startswith("set."):
        # one line for all: `otmix methods` explains each
        if argument.key == "set.alpha":
            yield (
                "--set.SETTING VALUE",
                "change a setting of the method, e.g. --set.alpha 1, --set.loss.tau 2; `otmix methods NAME` lists them",
            )
        return
    if argument.positional:
        head = argument.metavar
    elif argument.switch:
        head = f"--[no-]{argument.option[2:]}" if argument.default is not False else argument.option
    else:
        head = f"{argument.option} {argument.metavar}"
    text = argument.help[:1].upper() + argument.help[1:] if argument.positional else argument.help
    known = (
        argument.default is REQUIRED
        or argument.default is None
        or isinstance(argument.default, bool)
        or argument.several
    )
    note = "" if known or "(default" in text else f" [{argument.default}]"
    yield head, text.rstrip(".") + note


def _rows(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    for head, text in rows:
        wrapped = textwrap.wrap(" ".join(text.split()), width - _INDENT)
        if len(head) > _INDENT - 4:
            yield f"  {head}"
        else:
            yield f"  {head:<{_INDENT - 2}}" + (wrapped.pop(0) if wrapped else "")
        yield from (" " * _INDENT + line for line in wrapped)
