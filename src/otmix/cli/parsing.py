"""From an argument list to a call of a command. What does not fit is a UserError of one sentence.

First the words are sorted out: which flag has which value, in its one spelling (`--batch_size` is `--batch-size`). Then
configuration files fill in what was not typed. jsonargparse turns texts into the types of the function.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from otmix.cli.arguments import OWN, REQUIRED, Argument, arguments_of, config_parameter
from otmix.config import ADDED, RunConfig
from otmix.config_file import PLACES, in_type, of_a_part, parse_yaml, read_values
from otmix.errors import UserError
from otmix.files import from_home
from otmix.protocols import Overrides

CONFIG, PRINT_CONFIG = "--config", "--print_config"
METHODS, IMPORT = "methods", "import"
"""What of a file is a list of texts: what `otmix compare` compares, and the files of `--import`."""
GROUP_OF_SET = "method"


@dataclass(frozen=True)
class Call:
    """What an argument list asks for: the arguments of a command; or its configuration, to be printed instead."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    print_config: dict[str, Any] | None = None


@dataclass
class _Typed:
    """What was typed: texts by the key of their argument, True or False for switches, lists for repeatable flags."""

    flags: dict[str, str | bool] = field(default_factory=dict)
    repeated: dict[str, list[str]] = field(default_factory=dict)
    positional: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    print_config: bool = False


def parse(command: str, function: Callable[..., object], argv: Sequence[str]) -> Call:
    """Read the arguments of `otmix <command>`. Raises UserError."""
    if sys.platform == "win32" and (odd := [word for word in argv if '"' in word]):  # of "C:\my photos\", say
        raise UserError(f"{odd[0]} has a quotation mark in it; leave out the \\ at the end of a name that is in quotes")
    arguments, config_name = arguments_of(function), config_parameter(function)
    typed = _sort_out(command, arguments, argv, takes_config=config_name is not None)
    flags: dict[str, str | bool] = {}
    imports, methods = list[str](), list[str]()
    of_a_run = not typed.files
    for file in typed.files or _implied_files(command, typed.flags):
        read, lists = _read_config(file, command, arguments, of_a_run)
        flags |= read
        imports += lists.get(IMPORT, [])
        methods = lists.get(METHODS, methods)
    if all(a.bare is Path for a in arguments if a.positional):
        typed.positional = [from_home(text) for text in typed.positional]  # cmd.exe leaves ~ as it is
    if any(a.key == METHODS for a in arguments):
        typed.positional = typed.positional or methods
    if any(a.key == "imports" for a in arguments):
        typed.repeated["imports"] = [*dict.fromkeys(imports + typed.repeated.get("imports", []))]
    flags |= typed.flags
    parts = {key.removeprefix("set."): value for key, value in flags.items() if key.count(".") == 2}
    plain = {key: flags[key] for key in flags if key.count(".") < 2}
    found = _converted(command, arguments, plain, typed.positional, needs_all=not typed.print_config)
    own = [argument for argument in arguments if argument.group == OWN]
    positional = tuple(found[argument.key] for argument in own if argument.positional)
    named = {argument.key: found[argument.key] for argument in own if not (argument.positional or argument.repeated)}
    named |= {a.key: [a.bare(text) for text in typed.repeated.get(a.key, [])] for a in own if a.repeated}
    if config_name is None:
        return Call(positional, named)
    chosen = {a.key: found[a.key] for a in arguments if a.group != OWN and "." not in a.key}
    config = RunConfig(**chosen, set=Overrides(**found.get("set", {}), parts=_in_yaml(parts)))
    if not typed.print_config:
        return Call(positional, {**named, config_name: config})
    shown = {key: value for key, value in config.to_dict().items() if key in chosen or key == "set"}
    named_lists = {METHODS: typed.positional, IMPORT: typed.repeated.get("imports", [])}
    shown = {key: value for key, value in named_lists.items() if value} | shown
    flags_of_its_own = {a.key: _plain(found[a.key]) for a in own if not (a.positional or a.repeated)}
    return Call(positional, {**named, config_name: config}, flags_of_its_own | shown)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _sort_out(command: str, arguments: Iterable[Argument], argv: Sequence[str], takes_config: bool) -> _Typed:
    known = {_spelling(a.option): a for a in arguments if not a.positional}
    off = {f"--no-{a.option[2:]}": a for a in arguments if a.switch}
    special = (CONFIG, PRINT_CONFIG) if takes_config else ()
    typed, rest = _Typed(), iter(argv)
    for word in rest:
        if word == "--":
            typed.positional += rest
            break
        if not word.startswith("--"):
            typed.positional.append(word)
            continue
        option, equals, value = word.partition("=")
        spelling = _spelling(option)
        argument = known.get(spelling) or off.get(spelling) or _of_a_part(option, known)
        if argument is None and spelling not in map(_spelling, special):
            raise _unknown_flag(command, option, [*(a.option for a in known.values()), *off, *special])
        if spelling == _spelling(PRINT_CONFIG):
            typed.print_config = True
        elif argument is not None and argument.switch:
            if equals:
                raise UserError(f"{option} takes no value; write {argument.option} or --no-{argument.option[2:]}")
            typed.flags[argument.key] = spelling in known
        else:
            value = value if equals else next(rest, "")
            if not value or (value.startswith("--") and not equals):
                raise UserError(f"{option} needs a value")
            if argument is None or argument.bare is Path or argument.key in PLACES:
                value = from_home(value)  # no shell does in --out=~/x
            if argument is None:
                typed.files.append(Path(value))
            elif argument.repeated:
                typed.repeated.setdefault(argument.key, []).append(value)
            else:
                typed.flags[argument.key] = value
    return typed


def _of_a_part(option: str, known: Iterable[str]) -> Argument | None:
    """`--set.loss.tau` and the like, for commands that take `--set`: which ones there are depends on the method."""
    key = option.removeprefix("--")
    if not re.fullmatch(r"set\.\w+\.\w+", key) or not any(name.startswith("--set.") for name in known):
        return None
    return Argument(key, str, None, "", GROUP_OF_SET)


def _spelling(option: str) -> str:
    return option.replace("_", "-")


def _unknown_flag(command: str, option: str, known: Iterable[str]) -> UserError:
    if option == "--set" and (f"{option}.alpha" in known):
        return UserError("--set needs the name of a setting behind a dot, e.g. --set.alpha 1")
    if option.lstrip("-").replace("-", "_") in {f.name for f in fields(RunConfig)}:
        return UserError(f"`otmix {command}` has no use for {option}; leave it out")
    close = difflib.get_close_matches(_spelling(option), [*known], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"`otmix {command} --help` lists them"
    return UserError(f"`otmix {command}` has no flag {option}; {hint}")


def _implied_files(command: str, flags: dict[str, str | bool]) -> list[Path]:
    """The configuration that is meant without being named: of the run that is resumed, or whose mixes are previewed."""
    folder = flags.get({"train": "out", "preview": "run"}.get(command, ""))
    if folder is None or (command == "train" and not flags.get("resume")):
        return []
    file = Path(str(folder)) / "config.yaml"
    return [file] if file.is_file() else []


def _read_config(
    file: Path, command: str, arguments: Sequence[Argument], of_a_run: bool
) -> tuple[dict[str, str | bool], dict[str, list[str]]]:
    """What a YAML file says of the flags of this command, and its lists: `METHODS` and `IMPORT`. Raises UserError for
    settings that no command has.
    """
    settings = {f.name for f in fields(RunConfig)}
    own = {a.key for a in arguments if a.group == OWN and not (a.positional or a.repeated)}
    takes_methods = any(a.key == METHODS for a in arguments)
    known_lists = {METHODS, IMPORT} if takes_methods else {IMPORT}
    everything = read_values(file, own | known_lists, command=command, of_a_run=of_a_run)
    values = {key: value for key, value in everything.items() if value is not None or of_a_part(key)}
    lists = {key: _texts(file, key, values.pop(key)) for key in known_lists & values.keys()}
    record = of_a_run or not settings - everything.keys() - {"set", *ADDED}
    # the record of a run has one, which is not meant here
    if takes_methods and "method" in values and not record:
        raise UserError(
            f"`method` in {file} names a single one; `otmix {command}` takes several: write `methods: [erm, otmix]` in "
            "the file, or name them on the command line alone"
        )
    # `out`, of preview a picture, is of train a field of RunConfig, the folder of a run
    others = {key for key in own & settings if record or _is_folder(values.get(key))}
    taken = {a.key: a for a in arguments if a.group != OWN or a.key in own - others}
    read = {key: in_type(file, key, taken[key].hint, value) for key, value in values.items() if key in taken}
    found = {key: value if taken[key].switch else str(value) for key, value in read.items()}
    return found | {
        key: "null" if value is None else str(value) for key, value in values.items() if of_a_part(key)
    }, lists


def _is_folder(value: Any) -> bool:
    """Whether `out` is meant for `otmix train`, to which it is a folder: no name of a picture."""
    return isinstance(value, str) and Path(value).suffix.lower() != ".png"


def _texts(file: Path, key: str, value: Any) -> list[str]:
    """A list of texts, or one of them alone."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        example = {METHODS: "erm, otmix", IMPORT: "mine.py"}[key]
        raise UserError(f"`{key}` in {file} must be a list of texts, it is {value}; write e.g. `{key}: [{example}]`")
    return [from_home(text) for text in texts] if key == IMPORT else texts


def _in_yaml(parts: Mapping[str, str | bool]) -> dict[str, Any]:
    """Texts as the values that YAML takes them for; their settings' types are known with the method."""
    import yaml

    values: dict[str, Any] = {}
    for key, text in parts.items():
        try:
            value = parse_yaml(text) if isinstance(text, str) else text
            # on and off are names that a setting may have
            values[key] = text if isinstance(value, bool) and str(text).lower() not in ("true", "false") else value
        except (yaml.YAMLError, ValueError):
            raise UserError(
                f"--set.{key} must be a plain value, it is {text}; give a number, a name, true or false"
            ) from None
    return values


def _converted(
    command: str,
    arguments: Sequence[Argument],
    flags: dict[str, str | bool],
    positional: list[str],
    needs_all: bool = True,
) -> dict[str, Any]:
    """The values of all arguments but the repeatable ones, in the types of the function."""
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(prog=f"otmix {command}", exit_on_error=False, allow_abbrev=False, add_help=False)
    words = []
    for argument in arguments:
        if argument.positional:
            nargs: dict[str, Any] = {"nargs": "+" if needs_all else "*"} if argument.several else {}
            if not nargs and argument.default is not REQUIRED:
                nargs = {"nargs": "?"}
            parser.add_argument(argument.key, type=argument.bare, **nargs)
        elif argument.switch:
            parser.add_argument(argument.option, action=ActionYesNo(no_prefix="no-"), default=argument.default)
        elif not argument.repeated:
            parser.add_argument(argument.option, dest=argument.key, type=argument.hint, default=argument.default)
        if argument.key in flags:
            value = flags[argument.key]
            if argument.bare in (int, float) and ":" in str(value):  # jsonargparse takes 1:30 for 90, as YAML does
                raise UserError(_wrong_value(argument, str(value)))
            no = f"--no-{argument.option[2:]}"
            words.append(f"{argument.option}={value}" if isinstance(value, str) else argument.option if value else no)
    try:
        found: dict[str, Any] = parser.parse_args([*words, "--", *positional] if positional else words).as_dict()
    except argparse.ArgumentError as error:
        raise UserError(_sentence(command, str(error), arguments)) from None
    return found


def _sentence(command: str, message: str, arguments: Iterable[Argument]) -> str:
    """jsonargparse's report of several lines as one sentence in the user's words."""
    by_key = {argument.key: argument for argument in arguments}
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    value = re.findall(r"(?:Given value|Got value): (.*)", message)
    if key and value and key[1] in by_key:
        return _wrong_value(by_key[key[1]], value[-1])
    missing = re.search(r"arguments are required: (.+)", message)
    if missing:
        names = ", ".join(by_key[name].metavar if name in by_key else name for name in missing[1].split(", "))
        return f"`otmix {command}` needs {names}; `otmix {command} --help` has examples"
    extra = re.search(r"[Uu]nrecognized arguments: (?:-- )?(.+)", message)
    if extra:
        photos = "root" in by_key and Path(extra[1]).is_dir()
        hint = (
            f"did you mean --data folder --root {extra[1]}?"
            if photos
            else f"`otmix {command} --help` lists what it takes"
        )
        return f"`otmix {command}` does not know what to do with {extra[1]}; {hint}"
    return " ".join(message.split())


def _wrong_value(argument: Argument, value: str) -> str:
    if argument.choices:
        close = difflib.get_close_matches(value, argument.choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{argument.name} must be one of {', '.join(argument.choices)}, it is {value}{hint}"
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(argument.bare, str(argument.bare))
    return f"{argument.name} must be {kind}, it is {value}"
