"""Files: find them, hash them, and read their records with the place each one came from.

Formats: JSON lines, JSON (a list of objects), CSV, TSV and Parquet; all but Parquet also compressed as .gz or .xz; and
.tar.gz archives of CSV and TSV files, whose members are read one after the other. A folder stands for all such files
below it, for archives only where it has nothing else; where their names say train, validation or test they keep to
these splits. Records are read one by one, so that a broken line is named by file and line number and a large file needs
no second copy.

Archives come from strangers: members are read as a stream and never written to the disk; links, devices and hidden
files are passed over, and a member that unpacks to more than `MEMBER_BYTES` is refused.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import gzip
import hashlib
import io
import json
import lzma
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, NamedTuple

from saferlhf.errors import UserError

FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")
COMPRESSIONS = ("gz", "xz")
ARCHIVE = "tar"
"""Format of a .tar.gz archive; none of `FORMATS`, since it holds files instead of records."""

MEMBER_BYTES = 64 * 2**20
"""Largest unpacked size of an archive's member, in bytes."""

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


class Record(NamedTuple):
    """One raw record: its columns, and its place as `file:line` (text formats) or `file, row n`.

    A line that cannot be read is a record without columns; `fault` says what is wrong with it. `file` is the path of a
    CSV file, or a member's path within its archive, for layouts in which files have telling names.
    """

    values: dict[str, Any]
    place: str
    fault: UserError | None = None
    file: str = ""


@dataclass(frozen=True)
class FileSet:
    """The files below one folder, by split. A single file, and files whose names say no split, are all `train`."""

    root: Path
    train: tuple[Path, ...] = ()
    val: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    named: bool = False  # whether the files' names say the splits

    def all(self) -> tuple[Path, ...]:
        """Every file, in a fixed order."""
        return self.train + self.val + self.test

    def only(self, split: str) -> FileSet:
        """Just this split; files whose names say none all belong to it.

        Raises:
            UserError: the names say splits, and none is this one.
        """
        files = getattr(self, split) if self.named else self.all()
        if not files:
            what = f"no {split} file among {', '.join(path.name for path in self.all()[:5])}"
            mend = "name the file in data.path, or set data.split=null"
            raise UserError(what, f"{self.root}, data.split={split}", mend)
        return FileSet(self.root, **{split: files}, named=self.named)


def resolve_path(path: str, root: str | None, key: str) -> Path:
    """The existing file or folder that a config key names, below `root` where one is given.

    Raises:
        UserError: nothing is there; names that look alike are suggested.
    """
    wanted = Path(path).expanduser()
    if root is not None and not wanted.is_absolute():
        wanted = Path(root).expanduser() / wanted
    if wanted.exists():
        return wanted
    folder = next((parent for parent in wanted.parents if parent.is_dir()), Path("."))
    missing = wanted.relative_to(folder).parts[0] if folder != Path(".") or wanted.parts else str(wanted)
    near = difflib.get_close_matches(missing, sorted(p.name for p in folder.iterdir()), n=3, cutoff=0.5)
    if near:
        mend = "did you mean " + " or ".join(str(folder / name) for name in near) + "?"
    else:
        mend = f"give an existing file or folder as {key}=..."
    raise UserError(f"no such file or folder: {wanted}", key, mend)


def format_of(path: PurePath) -> str | None:
    """`jsonl`, `json`, `csv`, `tsv`, `parquet` or `tar` (.tar.gz) by the file's name; None for anything else."""
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    if suffixes[-2:] == ["tar", "gz"]:
        return ARCHIVE
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FORMATS:
        return None
    return "jsonl" if suffixes[-1] == "ndjson" else suffixes[-1]


def find_files(path: Path, key: str = "data.path", patterns: Sequence[str] = ()) -> FileSet:
    """The data files behind a path.

    Args:
        path: one file, or a folder with files at any depth.
        key: for messages.
        patterns: of a folder only files that fit one of these, as `*/30k/*`; compared with the path below the folder,
            whatever the case of letters, `*` standing for folders too.

    Raises:
        UserError: a folder without a data file, or a file of an unknown format.
    """
    known = f"known are {', '.join(f'.{name}' for name in FORMATS)}, also with .gz or .xz, and .tar.gz of CSV files"
    if path.is_file():
        if format_of(path) is None:
            raise UserError(f"unknown file format: {path.name}", key, known)
        return FileSet(path.parent, train=(path,))
    found = sorted(p for p in path.rglob("*") if p.is_file() and format_of(p) is not None and not _hidden(p, path))
    # an archive beside data files mostly holds the same files
    found = [p for p in found if format_of(p) != ARCHIVE] or found
    if not found:
        raise UserError(f"no data file in the folder {path}", key, known)
    if patterns:
        below = {p: f"/{p.relative_to(path).as_posix().lower()}" for p in found}
        wanted = [p for p in found if any(fnmatch.fnmatchcase(below[p], pattern.lower()) for pattern in patterns)]
        if not wanted:
            there = ", ".join(p.relative_to(path).as_posix() for p in found[:5]) + (", ..." if len(found) > 5 else "")
            what = f"no file in {path} fits {' or '.join(patterns)}"
            raise UserError(what, key, f"there are: {there}; choose another data.subset, or null for all of them")
        found = wanted
    by_split: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    named = {p: _split_of(p) for p in found}
    if "train" not in named.values():  # nothing says train: the words are no split names here
        return FileSet(path, train=tuple(found))
    for p, split in named.items():
        by_split[split or "train"].append(p)
    return FileSet(path, **{split: tuple(files) for split, files in by_split.items()}, named=True)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.name.split(".")[0].lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


_hashes: dict[tuple[str, int, int], str] = {}


def file_hash(path: Path) -> str:
    """SHA-256 of the file's bytes; remembered in this process by path, size and time of change."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        with path.open("rb") as stream:
            _hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _hashes[key]


def content_hash(files: Sequence[Path], root: Path) -> str:
    """One hash over files: their bytes, and where they are several their names below `root`; not where they lie."""
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(root).as_posix() if len(files) > 1 else ""
        digest.update(f"{name}\x00{file_hash(path)}\x00".encode())
    return digest.hexdigest()


def read_records(path: Path, header: bool = True) -> Iterator[Record]:
    """The records of one file, or of all members of an archive.

    Args:
        path: of a known format.
        header: whether the first line of a CSV file names its columns; else they are called `1`, `2`, ...

    Raises:
        UserError: a line that cannot be parsed or is no object, named by file and line; a broken archive; no UTF-8.
    """
    readers = {"jsonl": _read_lines, "json": _read_json, "parquet": _read_parquet}
    kind = format_of(path)
    if kind is None:
        raise UserError(f"unknown file format: {path.name}", str(path))
    try:
        if kind == ARCHIVE:
            yield from _read_archive(path, header)
        elif kind in ("csv", "tsv"):
            with _open_text(path) as stream:
                yield from _read_csv(stream, str(path), kind, header, path.as_posix())
        else:
            yield from readers[kind](path)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"broken archive: {error}", str(path), "fetch or write the file again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", str(path), "save the file as UTF-8") from error


def _opener(path: Path) -> Any:
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)


def _open_text(path: Path) -> IO[str]:
    # newline="": the csv module wants line ends as they are, json does not mind
    return _opener(path)(path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[no-any-return]


def _read_lines(path: Path) -> Iterator[Record]:
    with _opener(path)(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield Record(_as_object(json.loads(text), place), place)
            except UnicodeDecodeError as error:
                what = f"this line is not UTF-8 text (byte {error.start})"
                yield Record({}, place, UserError(what, place, "save the file as UTF-8"))
            except (ValueError, RecursionError) as error:  # json.JSONDecodeError; numbers of thousands of digits
                what = f"this line is not JSON: {getattr(error, 'msg', type(error).__name__)}"
                yield Record({}, place, UserError(what, place, "mend or remove the line"))
            except UserError as error:
                yield Record({}, place, error)


def _read_json(path: Path) -> Iterator[Record]:
    with _open_text(path) as stream:
        text = stream.read()
    if text.lstrip()[:1] == "{" and "\n" in text.strip():  # JSON lines under the name .json are common
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                yield from _read_lines(path)
                return
    try:
        values = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        raise UserError(f"not JSON: {error.msg}", place, "a .json file holds one list of objects") from error
    if not isinstance(values, list):
        what = f"a list of objects is needed, the file holds one {type(values).__name__}"
        raise UserError(what, str(path), "write [ {...}, {...} ] or one object per line as .jsonl")
    for number, value in enumerate(values, start=1):
        place = f"{path}, row {number}"
        try:
            yield Record(_as_object(value, place), place)
        except UserError as error:
            yield Record({}, place, error)


def _read_csv(stream: IO[str], where: str, kind: str, header: bool, file: str) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's 128 kB would refuse long answers
    rows = csv.DictReader if header else csv.reader
    reader: Any = rows(stream, delimiter="\t" if kind == "tsv" else ",", strict=True)  # type: ignore[operator]
    try:
        for fields in reader:
            place = f"{where}:{reader.line_num}"
            values = fields if header else {str(number): text for number, text in enumerate(fields, start=1)}
            if header and values.pop(None, None) is not None:
                mend = "quote fields that hold the separator"
                yield Record({}, place, UserError("more fields than the header has", place, mend))
            elif values:  # a blank line of a file without a header has no fields
                yield Record(values, place, file=file)
    except csv.Error as error:
        raise UserError(f"not CSV: {error}", f"{where}:{reader.line_num}", "mend or remove the line") from error


def _read_archive(path: Path, header: bool) -> Iterator[Record]:
    found = False
    # as a pipe: members come in their order, nothing is sought, nothing lands on the disk. Unpacked by gzip, since
    # tarfile's own pipe takes an archive that was cut off for a short one
    with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            kind = name.suffix.lstrip(".").lower()
            if not member.isfile() or kind not in ("csv", "tsv") or any(part.startswith(".") for part in name.parts):
                continue
            found = True
            # a name is a stranger's text too: an error stays one line
            where = f"{path}:{''.join(letter if letter.isprintable() else '?' for letter in member.name)}"
            if member.size > MEMBER_BYTES:
                what = f"this member has {member.size:,} bytes, {MEMBER_BYTES:,} at most are read"
                mend = "unpack the archive and name the folder in data.path"
                yield Record({}, where, UserError(what, where, mend))
                continue
            content = archive.extractfile(member)
            assert content is not None, "a regular file has content"
            # whole, since a pipe in an archive lacks what a text stream asks for; the limit keeps it small
            with io.TextIOWrapper(io.BytesIO(content.read()), encoding="utf-8-sig", newline="") as stream:
                try:
                    yield from _read_csv(stream, where, kind, header, member.name)
                except UnicodeDecodeError as error:
                    what = f"not UTF-8 text (byte {error.start})"
                    raise UserError(what, where, "save the file as UTF-8") from error
        while unpacked.read(2**20):  # to the end, where the checksum stands
            pass
    if not found:
        raise UserError("no CSV file in this archive", str(path), "pack CSV or TSV files into it, or unpack it")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Record(values, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        what = f"not a readable Parquet file: {str(error).splitlines()[0]}"
        raise UserError(what, str(path), "fetch or write the file again") from error


def _as_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = f"each row is an object with named columns, this one is a {type(value).__name__}"
        raise UserError(what, place, 'write {"prompt": ..., ...}')
    return value
