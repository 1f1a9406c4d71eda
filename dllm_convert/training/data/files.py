"""Files of text: what a path, a pattern or a folder stands for, and what of it is left out."""

from __future__ import annotations

import glob
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm_convert.errors import DataError
from dllm_convert.training.data.formats import EXPECTED, format_of, is_prose, unknown

SAVED = ("state.json", "dataset_info.json")
"""What `save_to_disk` writes beside a dataset's arrow files."""
_POINTERS = (b"version https://git-lfs.github.com/", b"../.git/annex/", b"/annex/objects/")
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|contributing|code_of_conduct|changelog"
    r"|requirements)\b.*"
)
_TERMS = re.compile(r"(licen[cs]e|copying|notice|citation)\b.*")
_METADATA = frozenset(
    (
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
        *("config.json", "croissant.json", "package.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    )
)
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Found:
    """Files of text.

    Attributes:
        files: Files, and folders that `save_to_disk` wrote, in a fixed order.
        left_out: Names of files in a folder that are not trained on, though they could be read.
    """

    files: tuple[Path, ...]
    left_out: tuple[str, ...] = ()


def find_files(source: str, split: str) -> Found | None:
    """Return the files that a `data.source` stands for, None if it stands for none.

    Args:
        source: Files, folders or globs separated by commas.
        split: Which split of a dataset in a folder is wanted.

    Raises:
        DataError: If one of several parts stands for nothing, or a file cannot be text.
    """
    whole = Path(source).expanduser()
    patterns = [source] if whole.exists() else [part.strip() for part in source.split(",")]
    found = [_expand(pattern, split) for pattern in patterns]
    if not any(found):
        return None
    files: list[Path] = []
    left_out: list[str] = []
    for pattern, part in zip(patterns, found, strict=True):
        if part is None:
            raise DataError(
                f"no file matches {pattern!r} of --data {source}", hint=f"Give {EXPECTED}"
            )
        files += part.files
        left_out += part.left_out
    return Found(tuple(files), tuple(left_out))


def _expand(pattern: str, split: str) -> Found | None:
    path = Path(pattern).expanduser()
    if path.exists() or path.is_symlink():
        return _folder(path, split) if path.is_dir() else Found((_readable(path),))
    matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    if not matches:
        return None
    parts = [_folder(match, split) for match in matches if match.is_dir()]
    files = [match for match in matches if not match.is_dir()]
    # A pattern that takes in a dataset's rows takes in what is said about them by accident.
    rows = any(format_of(file) not in (None, "text") for file in files) or bool(parts)
    about = {f for f in files if rows and _is_about(f)}
    # `**` names folders and, again, the files in them.
    inside = {file for part in parts for file in part.files}
    skipped = {name for part in parts for name in part.left_out}
    own = [f for f in files if f not in about | inside and str(f) not in skipped]
    if "**" in pattern:
        return Found(tuple(_readable(file) for file in files if file not in about), _names(about))
    return Found(
        (*(_readable(file) for file in own), *(file for part in parts for file in part.files)),
        (*_names(about), *(name for part in parts for name in part.left_out)),
    )


def _names(files: set[Path]) -> tuple[str, ...]:
    return tuple(str(file) for file in sorted(files))


def _readable(file: Path) -> Path:
    """See to it that a file that was named is one, and in a format that is read.

    Raises:
        DataError: If it is not.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror})", hint="Look at the path and its rights"
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise DataError(
            f"{file} is {kinds.get(stat.S_IFMT(mode), 'a device')}, expected a file: text is read "
            "more than once",
            hint="Write it to a file first",
        )
    if format_of(file) is None:
        raise unknown(file)
    check_pointer(file)
    return file


def check_pointer(file: Path) -> None:
    """See to it that a file is not what Git keeps in the place of a large one.

    Raises:
        DataError: If it is.
    """
    if file.stat().st_size > 1024:
        return
    try:
        with file.open("rb") as opened:
            start = opened.read(128)
    except OSError:
        return  # Reading it says why.
    if any(start.startswith(pointer) for pointer in _POINTERS):
        raise DataError(
            f"{file} is a Git LFS pointer, not the file itself",
            hint="Fetch it with `git lfs pull` in that folder, or with `hf download`",
        )


def _folder(folder: Path, split: str) -> Found:
    """Choose what to read of a folder, which may be a dataset's."""
    if _is_saved(folder):
        return Found((folder,))
    entries = list(_entries(folder))
    known = [entry for entry in entries if _is_sought(entry)]
    rows = [entry for entry in known if not is_prose(entry)]
    splits = {entry: _split_of(entry.relative_to(folder), split) for entry in known}
    if "train" not in splits.values() or len({*splits.values()} - {None}) < 2:
        # Prose may well be called test.md; in a dataset it is called train.txt beside it.
        splits |= {entry: None for entry in known if is_prose(entry)}
    dataset = bool(rows) or any(splits.values())
    about = {e for e in known if _is_about(e) and (dataset or _is_terms(e))}
    data = [entry for entry in known if entry not in about]
    chosen = _of_split(folder, data, splits, split)
    if not chosen and not known:
        others = sorted({entry.suffix or entry.name for entry in entries})
        raise DataError(
            f"the folder {folder} holds no text ({_few(others)})",
            hint=f"Give {EXPECTED}; files of code have to be named, as in '{folder}/**/*.py'",
        )
    for entry in chosen:
        if entry.is_file():
            check_pointer(entry)
    left_out = [str(entry) for entry in known if entry not in chosen]
    return Found(tuple(chosen), tuple(left_out))


def _is_sought(entry: Path) -> bool:
    """Whether a folder is searched for such a file, or saved dataset."""
    if entry.is_dir() or is_prose(entry):
        return True
    return format_of(entry) not in (None, "text") and entry.name.lower() not in _METADATA


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"it holds {shown}{', ...' if len(names) > 6 else ''}" if names else "it is empty"


def _entries(folder: Path) -> Iterator[Path]:
    """Yield files and saved datasets below a folder, in order, but for what is hidden."""
    for path in sorted(folder.iterdir(), key=lambda path: path.as_posix()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and (_is_saved(path) or path.is_symlink()):
            if _is_saved(path):
                yield path
        elif path.is_dir():
            yield from _entries(path)
        elif path.is_file():
            yield path


def _is_saved(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SAVED)


def _is_about(file: Path) -> bool:
    """Whether a file speaks about a dataset: its card, its licence."""
    return is_prose(file) and bool(_ABOUT.fullmatch(file.name.lower()))


def _is_terms(file: Path) -> bool:
    """Whether a file of prose among others is none of them: a licence, a dataset's card."""
    if _TERMS.fullmatch(file.name.lower()):
        return True
    if file.name.lower() != "readme.md":
        return False
    with file.open("rb") as opened:
        return opened.read(4) in (b"---\n", b"---\r")


def _of_split(
    folder: Path, data: Sequence[Path], splits: dict[Path, str | None], wanted: str
) -> list[Path]:
    """Return the files of one split; where none has a split's name, all of them."""
    named = [entry for entry in data if splits[entry] is not None]
    own = [entry for entry in named if splits[entry] == _canonical(wanted)]
    if own or not named:
        return own or list(data)
    others = [entry for entry in data if entry not in named]
    if others and wanted == "train":
        return others
    found = sorted({str(splits[entry]) for entry in named})
    raise DataError(
        f"the folder {folder} holds no split {wanted!r}, it holds {', '.join(found)}",
        hint=f"Name one with --set data.split={found[0]}, or name the files",
    )


def _canonical(split: str) -> str:
    return next((name for name, words in _SPLITS.items() if split in words), split)


def _split_of(path: Path, wanted: str) -> str | None:
    """Return the split that a file's name says it belongs to, or the nearest folder's."""
    words = {**_SPLITS, _canonical(wanted): (*_SPLITS.get(_canonical(wanted), ()), wanted)}
    own = path.name.split(".")[0] if path.suffix else path.name
    exact = is_prose(path)
    for part in (own.lower(), *(parent.name.lower() for parent in path.parents)):
        for split, names in words.items():
            name = "|".join(map(re.escape, names))
            # As `datasets` reads it; prose has to be called so, or numbered.
            pattern = (
                rf"({name})([-_.]\d+(-of-\d+)?)?"
                if exact
                else rf"(.*[-._ 0-9])?({name})([-._ 0-9].*)?"
            )
            if re.fullmatch(pattern, part):
                return split
    return None
