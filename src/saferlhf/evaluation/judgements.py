"""What one model said about the rows of one protocol, row by row, so that models can be compared in pairs later.

An evaluation leaves `judgements/<protocol>.npz` in its folder for each protocol. A comparison reads only these files:
no model is loaded, no row is scored again, and no text is in them (a prompt is the hash of its normalised words, enough
to resample rows of one prompt together). The files are plain arrays: pickles are neither written nor read.

Three kinds: `moderation` (verdicts on single answers or prompts), `reward` and `cost` (scores of pairs). Label
conventions are those of the whole project: 1 = unsafe = positive, 0 = safe, -1 = not labelled.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferlhf.data.rows import PreferencePair, Prompt, QuestionAnswer, as_prompt, content_id
from saferlhf.data.splits import prompt_key
from saferlhf.errors import UserError
from saferlhf.evaluation.preference import checked_scores, preferred_labels, unsafe_labels
from saferlhf.ops.moderation import SEVERITIES, ModerationLabels, Verdicts

Kind = Literal["moderation", "reward", "cost"]
Texts = NDArray[np.str_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FOLDER = "judgements"
"""Where they lie in the folder of an evaluation."""

KINDS: tuple[Kind, ...] = ("moderation", "reward", "cost")

HEADLINE: Mapping[Kind, str] = {
    "moderation": "unsafe/macro_f1",
    "reward": "reward/pair_accuracy",
    "cost": "cost/pair_accuracy",
}
"""What a protocol of this kind rests on unless it says otherwise, as `<area>/<metric>`."""

_FORMAT = "saferlhf judgements 1"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_MEND = "repeat the evaluation that wrote it"
_UNREADABLE = (AttributeError, TypeError, OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Judgements:
    """What one model said about N rows of one protocol.

    Attributes:
        protocol: name of the protocol, fit for a file's name.
        kind: "moderation", or for pairs what the scores are: "reward" (higher is better) or "cost" (above 0 unsafe).
        metric: what the protocol rests on, `<area>/<metric>` as `unsafe/macro_f1` or `cost/pair_accuracy`.
        row_ids: (N,) ids; a protocol may hold a row twice, then its first is compared with the first of others.
        prompts: (N,) 16 hex digits, the hash of the normalised prompt; equal hashes are resampled together.
        groups: (N,) name of a subset of the protocol, "" for none; None: it has no subsets.
        labels: of a moderation protocol, N rows.
        verdicts: of a moderation protocol, N rows; p_unsafe NaN: the model decides without a probability.
        preferred: of pairs, (N,) index of the preferred response, -1 not labelled.
        unsafe: of pairs, (N, 2) 1 unsafe, 0 safe, -1 not labelled.
        scores: of pairs, (N, 2) rewards or costs.
        parsed: (N,) False where the judge gave no verdict; what stands there is not to be read. None: it gave all.

    Raises:
        ValueError: parts that do not fit together.
    """

    protocol: str
    kind: Kind
    metric: str
    row_ids: Texts
    prompts: Texts
    groups: Texts | None = None
    labels: ModerationLabels | None = None
    verdicts: Verdicts | None = None
    preferred: Ints | None = None
    unsafe: Ints | None = None
    scores: Floats | None = None
    parsed: Bools | None = None

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def given(self) -> Bools:
        """(N,) True where there is a verdict."""
        return np.ones(len(self), dtype=bool) if self.parsed is None else self.parsed

    def taken(self, places: ArrayLike) -> Judgements:
        """The rows at `places` (M,), in that order."""
        chosen = np.asarray(places, dtype=np.int64)
        arrays = {name: values if name == "categories" else values[chosen] for name, values in _arrays(self).items()}
        return _built(self.protocol, self.kind, self.metric, arrays)

    def save(self, folder: str | Path) -> Path:
        """Write `<folder>/judgements/<protocol>.npz`, whole or not at all; an older file is replaced.

        Args:
            folder: of the evaluation. What is measured there needs a protocol's name of its own.
        """
        target = Path(folder) / FOLDER / f"{self.protocol}.npz"
        target.parent.mkdir(parents=True, exist_ok=True)
        head = {"format": _FORMAT, "protocol": self.protocol, "kind": self.kind, "metric": self.metric}
        arrays: dict[str, Any] = {name: np.array(text) for name, text in head.items()} | _arrays(self)
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                # every array is of numbers or texts (`_check`), so nothing is pickled
                np.savez_compressed(file, **arrays)
            os.chmod(draft, 0o644)
            os.replace(draft, target)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
        return target


# ------------------------------------------------------------------------------------------------ making them
def prompt_hashes(prompts: Iterable[Prompt]) -> Texts:
    """(N,) 16 hex digits per prompt; prompts of the same normalised words have the same."""
    return np.array([content_id(prompt_key(prompt)) for prompt in prompts], dtype="U16")


def _asked(row: QuestionAnswer) -> Prompt:
    """The prompt; of a text that is judged alone, as an answer to nothing, that text."""
    return row.prompt if prompt_key(row.prompt) else as_prompt(row.response)


def of_verdicts(
    protocol: str,
    rows: Sequence[QuestionAnswer],
    labels: ModerationLabels,
    verdicts: Verdicts,
    *,
    metric: str = HEADLINE["moderation"],
    groups: Sequence[str] | None = None,
    parsed: ArrayLike | None = None,
) -> Judgements:
    """Judgements of a moderator, a guard or a judge of single answers.

    Args:
        protocol: its name.
        rows: N rows in the order of labels and verdicts.
        labels, verdicts: as `evaluate_moderation` takes them.
        metric: `<area>/<metric>` that the protocol rests on.
        groups: N names of subsets.
        parsed: (N,) False where there is no verdict.
    """
    return Judgements(
        protocol,
        "moderation",
        metric,
        row_ids=_texts([row.id for row in rows]),
        prompts=prompt_hashes(_asked(row) for row in rows),
        groups=None if groups is None else _texts(groups),
        labels=labels,
        verdicts=verdicts,
        parsed=None if parsed is None else np.asarray(parsed, dtype=bool),
    )


def of_pairs(
    protocol: str,
    rows: Sequence[PreferencePair],
    scores: ArrayLike,
    *,
    kind: Literal["reward", "cost"],
    preference: str = "better",
    metric: str | None = None,
    groups: Sequence[str] | None = None,
    parsed: ArrayLike | None = None,
) -> Judgements:
    """Judgements of a reward or cost model on pairs.

    Args:
        protocol: its name.
        rows: N pairs in the order of the scores.
        scores: (N, 2) rewards or costs, column = response index.
        kind: "reward" or "cost".
        preference: which label a reward model is held against, as `evaluate_preference`; a cost model's is safer.
        metric: `<area>/<metric>` that the protocol rests on; None: the pair accuracy.
        groups: N names of subsets.
        parsed: (N,) False where there is no score.

    Raises:
        UserError: a score is not finite, or `preference` is unknown.
    """
    given = np.ones(len(rows), dtype=bool) if parsed is None else np.asarray(parsed, dtype=bool)
    values = np.where(given[:, None], np.asarray(scores, dtype=np.float64), 0.0)
    return Judgements(
        protocol,
        kind,
        HEADLINE[kind] if metric is None else metric,
        row_ids=_texts([row.id for row in rows]),
        prompts=prompt_hashes(row.prompt for row in rows),
        groups=None if groups is None else _texts(groups),
        preferred=preferred_labels(rows, "safer" if kind == "cost" else preference),
        unsafe=unsafe_labels(rows),
        scores=checked_scores([row.id for row in rows], values, columns=2),
        parsed=None if parsed is None else given,
    )


def _texts(values: Sequence[str]) -> Texts:
    return np.array([str(value) for value in values], dtype=np.str_)


# ------------------------------------------------------------------------------------------------ reading
def list_judgements(folder: str | Path) -> dict[str, Path]:
    """Protocol -> its file in the folder of an evaluation, by name; empty where there is none."""
    found = sorted((Path(folder) / FOLDER).glob("*.npz"))
    return {path.stem: path for path in found if not path.name.startswith(".")}


def load(path: str | Path) -> Judgements:
    """Read a file that `Judgements.save` wrote.

    Raises:
        UserError: no such file, a damaged one, or one of something else.
    """
    where = str(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError("no such file of judgements", where, _MEND) from None
    except _UNREADABLE as error:
        raise UserError(f"no judgements can be read: {error}", where, _MEND) from None
    head = {name: str(arrays.pop(name, "")) for name in ("format", "protocol", "kind", "metric")}
    if head["format"] != _FORMAT or head["kind"] not in KINDS:
        raise UserError("these are no judgements of this version", where, _MEND)
    try:
        return _built(head["protocol"], head["kind"], head["metric"], arrays)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"damaged judgements ({type(error).__name__}: {error})", where, _MEND) from None


# ------------------------------------------------------------------------------------------------ as arrays
_VERDICTS = ("p_unsafe", "p_severity", "p_category", "unsafe", "severity", "category", "unsafe_logit")
_LABELS = ("unsafe", "severity", "category")
_PAIRS = ("preferred", "unsafe", "scores")
_ROWS = ("row_ids", "prompts", "groups", "parsed")


def _arrays(judgements: Judgements) -> dict[str, NDArray[Any]]:
    """Name in the file -> array; parts that are not there are left out."""
    parts: dict[str, Any] = {name: getattr(judgements, name) for name in _ROWS}
    if judgements.labels is not None:
        parts |= {f"label_{name}": getattr(judgements.labels, name) for name in _LABELS}
        parts["categories"] = _texts(judgements.labels.categories)
    if judgements.verdicts is not None:
        parts |= {f"verdict_{name}": getattr(judgements.verdicts, name) for name in _VERDICTS}
    parts |= {f"pair_{name}": getattr(judgements, name) for name in _PAIRS}
    return {name: np.asarray(values) for name, values in parts.items() if values is not None}


def _built(protocol: str, kind: Any, metric: str, arrays: Mapping[str, NDArray[Any]]) -> Judgements:
    labels = verdicts = None
    if kind == "moderation":
        categories = tuple(str(name) for name in arrays["categories"])
        known: dict[str, Any] = {name: arrays[f"label_{name}"] for name in _LABELS}
        labels = ModerationLabels(**known, categories=categories)
        parts: dict[str, Any] = {name: arrays.get(f"verdict_{name}") for name in _VERDICTS}
        verdicts = Verdicts(**parts | {name: arrays[f"verdict_{name}"] for name in ("p_unsafe", "unsafe")})
    rows: dict[str, Any] = {name: arrays.get(name) for name in _ROWS}
    rows |= {name: arrays[name] for name in ("row_ids", "prompts")}
    rows |= {name: arrays.get(f"pair_{name}") for name in _PAIRS}
    return Judgements(protocol, kind, metric, labels=labels, verdicts=verdicts, **rows)


# ------------------------------------------------------------------------------------------------ checks
def _check(found: Judgements) -> None:
    """Everything that a metric relies on.

    Raises:
        ValueError: it does not hold.
    """
    if not _NAME.fullmatch(found.protocol):
        raise ValueError(f"the protocol's name '{found.protocol}' is none of letters, digits, '_', '-' and '.'")
    if found.kind not in KINDS:
        raise ValueError(f"unknown kind '{found.kind}'")
    if found.metric.count("/") != 1:
        raise ValueError(f"the metric '{found.metric}' is not <area>/<metric>")
    n = len(found.row_ids)
    for name, values in _arrays(found).items():
        text = name in ("row_ids", "prompts", "groups", "categories")
        if values.dtype.kind not in ("U" if text else "bif"):
            raise ValueError(f"{name} is of type {values.dtype}")
        if name != "categories" and (not values.ndim or len(values) != n):
            raise ValueError(f"{name} has shape {values.shape} for {n} rows")
    if found.parsed is not None and (found.parsed.shape != (n,) or found.parsed.dtype != np.bool_):
        raise ValueError("parsed must be (N,) of bool")
    if found.kind == "moderation":
        _check_moderation(found)
    else:
        _check_pairs(found)


def _check_moderation(found: Judgements) -> None:
    labels, verdicts = found.labels, found.verdicts
    if labels is None or verdicts is None:
        raise ValueError("moderation needs labels and verdicts")
    n, width = len(found), len(labels.categories)
    _in_range("labels of unsafe", labels.unsafe, (n,), -1, 1)
    _in_range("labels of severity", labels.severity, (n,), -1, SEVERITIES - 1)
    _in_range("labels of categories", labels.category, (n, width), -1, 1)
    given = found.given
    _in_range("unsafe", verdicts.unsafe, (n,), 0, 1)
    for name, values, shape in (
        ("p_unsafe", verdicts.p_unsafe, (n,)),
        ("p_severity", verdicts.p_severity, (n, SEVERITIES)),
        ("p_category", verdicts.p_category, (n, width)),
    ):
        if values is not None:
            # without a probability is one thing (NaN), a wrong one another
            _in_range(name, np.nan_to_num(values, posinf=2.0, neginf=-1.0), shape, 0, 1, given)
    if verdicts.severity is not None:
        _in_range("severity", verdicts.severity, (n,), 0, SEVERITIES - 1, given)
    if verdicts.category is not None:
        _in_range("category", verdicts.category, (n, width), 0, 1, given)
    if verdicts.unsafe_logit is not None and verdicts.unsafe_logit.shape != (n,):
        raise ValueError(f"unsafe_logit has shape {verdicts.unsafe_logit.shape} for {n} rows")


def _check_pairs(found: Judgements) -> None:
    if found.preferred is None or found.unsafe is None or found.scores is None:
        raise ValueError("pairs need preferred, unsafe and scores")
    n = len(found)
    _in_range("preferred", found.preferred, (n,), -1, 1)
    _in_range("unsafe", found.unsafe, (n, 2), -1, 1)
    if found.scores.shape != (n, 2) or not np.isfinite(found.scores[found.given]).all():
        raise ValueError(f"scores must be finite and ({n}, 2), got shape {found.scores.shape}")


def _in_range(
    name: str, values: NDArray[Any], shape: tuple[int, ...], low: float, high: float, where: Bools | None = None
) -> None:
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape} instead of {shape}")
    counted = values if where is None else values[where]
    if counted.size and not (counted.min() >= low - 1e-6 and counted.max() <= high + 1e-6):
        raise ValueError(f"{name} lies outside of {low:g} .. {high:g}")
