"""Any folder of images: one folder per class, perhaps inside `train/` beside `test/` or `val/`."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from otmix.data.decoding import IMAGE_ENDINGS, size_of
from otmix.data.resizing import SMALL
from otmix.data.sources import FileSource, RawData, average_channels
from otmix.errors import UserError
from otmix.files import printable
from otmix.wording import counted

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE_SIZE = 224
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VALIDATION = ("val", "validation", "valid")


def load_folder(root: str | Path, channels: int = 3) -> RawData:
    """`root/train/<class>/…` with `test/`, `val/` or both, or one tree `root/<class>/…` (then `test` is None).
    The folders may also be called `training/`, `testing/`, `valid/` and `validation/`, in any case of letters.

    Classes are the sorted names of the folders; inside them images are found at any depth and sorted by path. Hidden
    files are passed over, and files with other endings, which a note counts, as are otmix's own runs. Raises UserError
    for a path that is no folder or may not be read, fewer than two classes, a class folder without images, two of the
    same name, and a class of `test/` or `val/` that `train/` lacks.
    """
    root = Path(root)
    try:
        is_folder, exists = root.is_dir(), root.exists()
    except OSError as error:  # it lies below a folder that may not be entered, or its name is too long
        raise _not_to_be_read(error) from error
    if not is_folder:
        what = "is not a folder" if exists else "does not exist"
        raise UserError(f"{root} {what}; --root must name a folder of images, one folder per class")
    parts = {folder.name.lower(): folder for folder in visible_folders(root)}
    train_folder = next((parts[name] for name in _TRAIN if name in parts), None)
    beside = [name for name in (*_TEST, *_VALIDATION) if name in parts]
    if beside and (train_folder is None or not visible_folders(train_folder)):
        raise UserError(
            f"{root} has {beside[0]}/ but no train/<class>/ folders; put the training images of each class there"
        )
    found = Found()
    if train_folder is None or not visible_folders(train_folder):
        train = _scan(root, root, found)
        _require_two(root, train)
        notes = [*_stray(root), *_of_runs(found), *passed_over(found.others), *_alike(train)]
        return _raw(root, channels, train, None, None, [*notes, *_linked(root, found, train)])
    test_folder = next((parts[name] for name in _TEST if name in parts), None)
    validation_folder = next((parts[name] for name in _VALIDATION if name in parts), None)
    notes = _stray(train_folder)
    used = {train_folder, test_folder, validation_folder}
    if beside_it := [folder.name for folder in visible_folders(root) if folder not in used]:
        notes.append(
            f"Beside train/, the folder {_listed(beside_it)} is passed over: held-out images are looked for in "
            "test/ and val/."
        )
    if test_folder is None and validation_folder is not None:
        test_folder, validation_folder = validation_folder, None
        notes.append(
            f"Only {test_folder.name}/ stands beside train/: it is the held-out test split, so choose no setting by it."
        )
    train = _scan(train_folder, root, found)
    _require_two(train_folder, train)
    test = None if test_folder is None else _scan(test_folder, root, found)
    validation = None if validation_folder is None else _scan(validation_folder, root, found)
    notes += [
        *_of_runs(found),
        *passed_over(found.others),
        *_alike(train),
        *_linked(root, found, train, test, validation),
    ]
    for folder, classes in ((test_folder, test), (validation_folder, validation)):
        if folder is None or classes is None:
            continue
        if extra := sorted(set(classes) - set(train)):
            raise UserError(
                f"{folder} has the class {_listed(extra)}, which {train_folder} lacks; the classes must agree"
            )
        if missing := sorted(set(train) - set(classes)):
            notes.append(f"{folder.name}/ has no image of the class {_listed(missing)}.")
    return _raw(root, channels, train, validation, test, notes)


def choose_image_size(source: FileSource, large: int = LARGE_SIZE, sample: int = 512) -> int:
    """The median shorter side where that is small (<= 64 px), else `large`; from up to `sample` files' headers."""
    step = max(1, -(-len(source) // sample))  # through all of them: they are in the order of the classes
    sizes = [size_of(source.root / path) for path in source.paths[::step]]
    sides = [min(size) for size in sizes if size is not None]
    size = round(median(sides)) if sides else large
    return size if size <= SMALL else large


@dataclass(eq=False)
class Found:
    """What a search for images met besides them: other files by their endings, whether any link, and the folders in the
    place of a class that hold runs.
    """

    others: Counter[str] = field(default_factory=Counter)
    links: bool = False
    runs: list[str] = field(default_factory=list)


def visible_folders(folder: Path) -> list[Path]:
    try:
        return sorted((entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name)), key=_name)
    except OSError as error:
        raise _not_to_be_read(error) from error


def _not_to_be_read(error: OSError, folder: Path | None = None) -> UserError:
    """Images below it would be missing without a word. `folder`: what cannot be read, where it is not the file of the
    error.
    """
    where = error.filename if folder is None else folder
    return UserError(f"the folder {where} cannot be read ({error.strerror}); {_remedy(error)}")


def _remedy(error: OSError) -> str:
    return "give it a shorter name" if error.errno == errno.ENAMETOOLONG else "give it read permission"


def _is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a run: before anything is written it has its lock alone. Raises UserError
    for a folder that may not be read.
    """
    try:
        if all((folder / name).exists() for name in ("config.yaml", "settings.json")):
            return True
        return (folder / ".lock").exists() and sum(1 for _ in folder.iterdir()) == 1
    except OSError as error:
        raise _not_to_be_read(error, folder) from error


def _holds_runs(folder: Path) -> bool:
    """Whether a folder is the directory of a run, or has some and no image at any depth, or is called `runs`: that may
    stand beside the classes.
    """
    if _is_run(folder):
        return True
    found = False
    try:
        with os.scandir(folder) as entries:  # is_dir without a look at each of perhaps 100,000 files
            for entry in entries:
                if entry.is_dir():
                    found = found or _is_run(Path(entry.path))
                elif _is_image(entry.name):
                    return False
    except OSError as error:
        raise _not_to_be_read(error) from error
    return found and (folder.name == "runs" or not images_below(folder, Found()))


def _name(path: Path) -> str:
    return path.name


_OF_DRIVES = ("$RECYCLE.BIN", "System Volume Information")
"""What Windows has on every drive, and nobody sees: a stick may hold nothing but the folders of the classes."""


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX")) or name in _OF_DRIVES


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (100,000 Paths are slow)


def _is_image(name: str) -> bool:
    return not _hidden(name) and _ending(name) in IMAGE_ENDINGS


def images_below(folder: Path, found: Found) -> list[str]:
    """Paths relative to `folder`, with forward slashes, of the images at any depth, sorted; what is hidden is left out,
    and what belongs to a run of otmix.

    Links are followed, but no folder is visited twice. `found` is told of the rest. Raises UserError for a folder that
    may not be read.
    """

    def refuse(error: OSError) -> None:
        raise _not_to_be_read(error) from error

    paths: list[str] = []
    visited = {folder.resolve()}
    for directory, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(directory)
        kept = []
        for name in sorted(below):
            if _hidden(name) or _is_run(here / name):
                continue
            real = (here / name).resolve()
            if real not in visited:
                visited.add(real)
                kept.append(name)
            found.links |= (here / name).is_symlink()
        below[:] = kept
        inside = "" if here == folder else f"{here.relative_to(folder).as_posix()}/"
        for name in files:
            if _hidden(name):
                continue
            try:
                mode = os.lstat(os.path.join(directory, name)).st_mode  # noqa: PTH118 (100,000 Paths are slow)
            except OSError as error:  # the folder may be listed, but not entered
                raise _not_to_be_read(error, here) from error
            found.links |= stat.S_ISLNK(mode)
            # whoever opened a pipe would wait for ever
            if _is_image(name) and (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                paths.append(f"{inside}{name}")
            else:
                found.others[_ending(name)] += 1
    return sorted(paths)


def _scan(folder: Path, root: Path, found: Found) -> dict[str, list[str]]:
    """Class name -> sorted paths of its images relative to `root`."""
    classes = {}
    for class_folder in visible_folders(folder):
        if _holds_runs(class_folder):
            found.runs.append(class_folder.relative_to(root).as_posix())
            continue
        found.links |= class_folder.is_symlink()
        inside = class_folder.relative_to(root).as_posix()
        paths = [f"{inside}/{path}" for path in images_below(class_folder, found)]
        if not paths:
            endings = " ".join(sorted(IMAGE_ENDINGS))
            raise UserError(
                f"the class folder {class_folder} holds no image ({endings}); add images to it or remove the folder"
            )
        classes[class_folder.name] = paths
    if not classes:
        raise UserError(f"{folder} holds no class folder; put the images of each class into a folder of their own")
    return classes


def _require_two(folder: Path, classes: dict[str, list[str]]) -> None:
    if len(classes) < 2:
        only = next(iter(classes))
        inner = [inside.name for inside in visible_folders(folder / only)]
        wrapped = len(inner) > 1 or any(name.lower() in _TRAIN for name in inner)
        hint = f"; did you mean --root {folder / only}?" if wrapped else ""
        raise UserError(f"{folder} holds only the class '{only}'; there must be at least two to tell apart{hint}")
    printed = Counter(map(printable, classes))
    if twice := [name for name, n in printed.items() if n > 1]:
        raise UserError(f"{folder} has two classes that are written '{twice[0]}'; rename one of the folders")


def _of_runs(found: Found) -> list[str]:
    return [f"The folder {_listed(found.runs)} holds runs of otmix and is no class."] if found.runs else []


def _alike(classes: dict[str, list[str]]) -> list[str]:
    """Names that differ in capitals or spaces only may be one class by a slip."""
    same: dict[str, list[str]] = {}
    for name in classes:
        same.setdefault(" ".join(name.casefold().split()), []).append(name)
    return [
        f"The classes {_listed(names)} differ in capitals or spaces only: are they one?"
        for names in same.values()
        if len(names) > 1
    ]


def _linked(root: Path, found: Found, *splits: dict[str, list[str]] | None) -> list[str]:
    """One image behind two names may be trained and tested on."""
    if not found.links:
        return []
    paths = [path for split in splits if split is not None for paths in split.values() for path in paths]
    files = Counter(os.path.realpath(root / path) for path in paths)
    again = sum(n > 1 for n in files.values())
    return (
        [f"Links lead to {counted(again, 'image')} more than once: a class or a split may hold what another holds too."]
        if again
        else []
    )


def _stray(folder: Path) -> list[str]:
    stray = sum(entry.is_file() and _is_image(entry.name) for entry in folder.iterdir())
    return [f"Images directly in {folder.name}/ belong to no class and are passed over: {stray}."] if stray else []


def passed_over(others: Counter[str]) -> list[str]:
    """Half of the pictures may be in a format that is not read, and nobody would know."""
    if not others:
        return []
    listed = ", ".join(f"{n:,} {ending or 'without an ending'}" for ending, n in others.most_common(5))
    more = f" and {len(others) - 5} other endings" if len(others) > 5 else ""
    return [f"Files that are not read as images are passed over: {listed}{more}."]


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _raw(
    root: Path,
    channels: int,
    train: dict[str, list[str]],
    validation: dict[str, list[str]] | None,
    test: dict[str, list[str]] | None,
    notes: list[str],
) -> RawData:
    names = tuple(sorted(train))

    def source(found: dict[str, list[str]]) -> FileSource:
        paths = [path for name in names for path in found.get(name, ())]
        sizes = torch.tensor([len(found.get(name, ())) for name in names])
        return FileSource(root, tuple(paths), torch.repeat_interleave(torch.arange(len(names)), sizes), channels)

    return RawData(
        name=printable(root.resolve().name) or "folder",
        class_names=tuple(map(printable, names)),
        train=source(train),
        validation=None if validation is None else source(validation),
        test=None if test is None else source(test),
        mean=average_channels(IMAGENET_MEAN, channels),
        std=average_channels(IMAGENET_STD, channels),
        channels=channels,
        notes=tuple(notes),
    )
