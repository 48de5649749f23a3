"""Locate: the files behind a data config, and their content hash.

In this order: `data.path`; below `data.root` the folder that has one of the data set's usual names; `data.hub`, the
Hugging Face hub. `data.subset` chooses among the files, `data.split` takes just one of their splits; with
`data.named_splits=false` names say nothing about splits: on the hub the only split of a set is mostly called `train`,
also where the set was made for tests.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from saferlhf.config.schema import DataConfig
from saferlhf.data.files import FileSet, content_hash, find_files, resolve_path
from saferlhf.data.sources.hub import fetch
from saferlhf.errors import UserError


@dataclass(frozen=True)
class Located:
    """Files of a data config.

    Attributes:
        files: of all splits.
        test: the files of `data.test_path`, which all are test files.
        revision: `name@commit` where they came from the hub.
    """

    files: FileSet
    test: FileSet | None = None
    revision: str | None = None

    def by_split(self) -> dict[str, tuple[Path, ...]]:
        """Files of each split that has some."""
        test = self.files.test if self.test is None else self.test.test
        splits = {"train": self.files.train, "val": self.files.val, "test": test}
        return {split: paths for split, paths in splits.items() if paths}

    def name(self, path: Path) -> str:
        """A file's name below its folder, for the report."""
        for files in (self.files, self.test):
            if files is not None and path.is_relative_to(files.root):
                return path.relative_to(files.root).as_posix()
        return path.name

    def content(self) -> list[str]:
        """Hashes of the content, equal wherever the files lie."""
        return [content_hash(files.all(), files.root) for files in (self.files, self.test) if files is not None]


def locate(cfg: DataConfig) -> Located:
    """Find the files, fetching those of the hub that are not in its cache.

    Raises:
        UserError: no path, nothing there, no such subset or split, or two answers to what the test files are.
    """
    patterns = _patterns(cfg)
    revision = None
    if cfg.path is not None:
        files = find_files(resolve_path(cfg.path, cfg.root, "data.path"), "data.path", patterns)
    elif cfg.root is not None:
        files = find_files(_folder(cfg), "data.root", patterns)
    elif cfg.hub is not None:
        folder = fetch(cfg.hub, cfg.revision, patterns)
        files, revision = find_files(folder, "data.hub", patterns), f"{cfg.hub}@{folder.name}"
    else:
        raise UserError("no data file given", "data.path", "give one as data.path=FILE_OR_FOLDER")
    if cfg.named_splits is False:
        files = FileSet(files.root, train=files.all())
    if cfg.split is not None:
        files = files.only(cfg.split)
    if cfg.test_path is None:
        return Located(files, None, revision)
    if files.test:
        what = f"{files.root} has test files of its own ({files.test[0].name})"
        mend = "leave data.test_path out, or set data.split=train, or name the training file in data.path"
        raise UserError(what, "data.test_path", mend)
    test = find_files(resolve_path(cfg.test_path, cfg.root, "data.test_path"), "data.test_path")
    return Located(files, FileSet(test.root, test=test.test or test.all()), revision)


def _patterns(cfg: DataConfig) -> tuple[str, ...]:
    """Which files the subset stands for; none for all."""
    if cfg.subset is None:
        return ()
    if cfg.subset not in cfg.subsets:
        known = ", ".join(cfg.subsets) or "none"
        raise UserError(f"{cfg.name} has no subset '{cfg.subset}'", "data.subset", f"known are {known}")
    return tuple(cfg.subsets[cfg.subset])


def _folder(cfg: DataConfig) -> Path:
    """The data set's folder below `data.root`: the first of its usual names that is there, in any case of letters."""
    root = resolve_path(str(cfg.root), None, "data.root")
    if not cfg.folder:
        return root
    if not root.is_dir():
        raise UserError(f"data.root is a folder of data sets, {root} is a file", "data.root", "name it in data.path")
    there = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    for name in cfg.folder:
        if name.lower() in there:
            return there[name.lower()]
    near = difflib.get_close_matches(cfg.folder[0].lower(), there, n=1, cutoff=0.5)
    mend = "give the files as data.path=FILE_OR_FOLDER"
    mend = f"if you mean {there[near[0]].name}: data.path={there[near[0]]}; else {mend}" if near else mend
    raise UserError(f"no folder {' or '.join(cfg.folder)} in {root}", "data.root", mend)
