"""A plain Python function as a scorer, named by `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saferlhf.data.rows import prompt_text
from saferlhf.errors import UserError
from saferlhf.rollout.scorers import Failure, ScoreRequest, Scores


class FunctionScorer:
    """Scores by a function of the user's.

    Args:
        function: `f(prompt, response)` with two texts (turns of a conversation joined by newlines), or with `batched`
            `f(rows)` with a list of `ScoreRequest`. It returns a number, or a mapping output -> number; batched, a
            sequence of N numbers, or a mapping output -> sequence. None and NaN say that there is no score.
        outputs: names of its scores.
        batched: see `function`.
        name: in metrics and messages.

    An exception fails the row that it was raised for, batched the whole call.
    """

    def __init__(
        self, function: Callable[..., Any], outputs: Sequence[str], *, batched: bool = False, name: str = "function"
    ) -> None:
        if not outputs:
            raise UserError("a scorer needs at least one output", f"judge '{name}'", "name it: outputs=[reward]")
        self.function, self._outputs, self.batched, self._name = function, tuple(outputs), batched, name

    @classmethod
    def by_name(cls, path: str, outputs: Sequence[str], *, batched: bool = False, name: str = "function") -> Any:
        """The scorer of `module:function`.

        Raises:
            UserError: no such module or function.
        """
        return cls(find_function(path), outputs, batched=batched, name=name)

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return self._name

    @property
    def outputs(self) -> tuple[str, ...]:
        """As given."""
        return self._outputs

    def score(self, rows: Sequence[ScoreRequest]) -> Scores:
        """Scores of N requests.

        Raises:
            UserError: what the function returns is not made of the outputs it was to give.
        """
        if self.batched:
            return Scores(self._columns(self.function(list(rows)), len(rows)))
        found = np.full((len(rows), len(self._outputs)), np.nan)
        failures = []
        for i, row in enumerate(rows):
            try:
                result = self.function(prompt_text(row.prompt), row.response)
            except Exception as error:  # anybody's code; the type only, a message may quote the texts
                failures.append(Failure(row.row_id, "exception", f"{type(error).__name__} in the function", i))
            else:
                columns = self._columns(result, None)
                found[i] = [columns[name] for name in self._outputs]
        return Scores({name: found[:, k] for k, name in enumerate(self._outputs)}, tuple(failures))

    def _columns(self, result: Any, count: int | None) -> dict[str, Any]:
        """Output -> (count,) float64, or a single number."""
        where = f"judge '{self.name}'"
        if not isinstance(result, Mapping):
            if len(self._outputs) > 1:
                wanted = ", ".join(self._outputs)
                raise UserError(f"the function returned {_kind(result)}", where, f"return a mapping with {wanted}")
            result = {self._outputs[0]: result}
        missing = [name for name in self._outputs if name not in result]
        if missing:
            raise UserError(f"the function returned no '{missing[0]}'", where, "return it, or change outputs")
        columns = {}
        for name in self._outputs:
            try:
                column = np.asarray(result[name], dtype=np.float64)  # None becomes NaN
            except (TypeError, ValueError):
                what = f"the function returned {_kind(result[name])} for '{name}'"
                raise UserError(what, where, "return numbers") from None
            if column.shape != (() if count is None else (count,)):
                what = f"the function returned shape {column.shape} for '{name}'"
                raise UserError(what, where, "return one number per response")
            columns[name] = column
        return columns


def find_function(path: str) -> Callable[..., Any]:
    """The function of `module:function`.

    Raises:
        UserError: no such module or function.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise UserError(f"'{path}' names no function", "judge.function", "write module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        mend = "is its folder on PYTHONPATH?"
        raise UserError(f"no module named '{error.name}'", f"judge.function={path}", mend) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"'{module_name}' has no function '{attribute}'", "judge.function", "check its spelling")
    return found


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
