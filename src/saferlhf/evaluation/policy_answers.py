"""What policies answered to the same prompts, and what judges said of the answers.

Layout: n prompts, k responses to each, arrays (n, k). A score of NaN means that the judge gave none; why is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.data.rows import Prompt, prompt_text
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.rollout.scorers import Scorer, ScoreRequest, Scores

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class PromptSet:
    """The prompts that all policies answer.

    Attributes:
        ids: n row ids; the sampling noise belongs to them.
        prompts: n conversations.
        harmful: (n,) 1 = complying would do harm, 0 = benign, NaN = not known.
    """

    ids: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    harmful: Floats

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, processes: Processes) -> PromptSet:
        """Those of this process.

        Raises:
            UserError: fewer prompts than processes.
        """
        if len(self) < processes.size:
            what = f"{len(self)} prompts for {processes.size} processes"
            raise UserError(what, "trainer.devices", "use more prompts or fewer devices")
        harmful = self.harmful[processes.rank :: processes.size]
        return PromptSet(tuple(processes.mine(self.ids)), tuple(processes.mine(self.prompts)), harmful)

    @property
    def texts(self) -> list[str]:
        """The words of each prompt: what the intervals are clustered by."""
        return [prompt_text(prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class Judged:
    """What one judge said.

    Attributes:
        values: output -> (n, k); NaN where it gave no score.
        failures: kind of failure -> responses that failed with it.
        rejected: (n, k) True where the judge failed; None: nowhere.
    """

    values: Mapping[str, Floats]
    failures: Mapping[str, int] = field(default_factory=dict)
    rejected: Bools | None = None


@dataclass(frozen=True)
class PolicyAnswers:
    """Responses of one policy.

    Attributes:
        texts: n tuples of k responses.
        tokens: (n, k) tokens of each, the end-of-sequence token included when it came.
        truncated: (n, k) True where the length limit cut it off.
        kl: (n, k) KL divergence to the reference along each response, in nats; None: not measured.
        judged: name of a judge -> what it said, in the order of the judges.
    """

    texts: tuple[tuple[str, ...], ...]
    tokens: NDArray[np.int64]
    truncated: Bools
    kl: Floats | None = None
    judged: Mapping[str, Judged] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def empty(self) -> Bools:
        """(n, k) True where there is no word."""
        return np.array([[not text.strip() for text in row] for row in self.texts], dtype=bool).reshape(self.shape)


def requests(prompts: PromptSet, answers: PolicyAnswers) -> list[ScoreRequest]:
    """What a judge is asked: n * k responses, all of the first prompt first."""
    return [
        ScoreRequest(prompts.ids[i], prompts.prompts[i], text, bool(answers.truncated[i, j]))
        for i, row in enumerate(answers.texts)
        for j, text in enumerate(row)
    ]


def judged_by(prompts: PromptSet, answers: PolicyAnswers, judges: Sequence[Scorer]) -> PolicyAnswers:
    """The answers with what each judge says of them; nothing but the prompt and the response is shown to a judge.

    Raises:
        ValueError: two judges of one name.
    """
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ValueError(f"judges need different names, got {', '.join(names)}")
    asked = requests(prompts, answers)
    found = {judge.name: _shaped(judge.score(asked), answers.shape) for judge in judges}
    return replace(answers, judged={**answers.judged, **found})


def _shaped(scores: Scores, shape: tuple[int, int]) -> Judged:
    values = {name: np.asarray(column, dtype=np.float64).reshape(shape) for name, column in scores.values.items()}
    return Judged(values, scores.counts(), ~scores.scored.reshape(shape))


# ------------------------------------------------------------------------------------------------ several processes
def united_answers(
    processes: Processes, prompts: int, work: Callable[[], Mapping[str, PolicyAnswers]]
) -> tuple[Mapping[str, PolicyAnswers], Mapping[str, PolicyAnswers]]:
    """Answers to the prompts of this process, and those to all prompts put together.

    Args:
        processes: each has the prompts that `PromptSet.of` gives it.
        prompts: how many there are in all.
        work: name of a policy -> its answers to this process's prompts.

    Raises:
        UserError: of any process.
    """
    parts = processes.each(work)
    own = parts[processes.rank]
    if len(parts) == 1:
        return own, own
    return own, {name: _united([part[name] for part in parts], prompts) for name in own}


def _united(parts: Sequence[PolicyAnswers], prompts: int) -> PolicyAnswers:
    def whole(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        found = np.empty((prompts, columns[0].shape[1]), columns[0].dtype)
        for rank, column in enumerate(columns):
            found[rank :: len(columns)] = column
        return found

    texts: list[tuple[str, ...]] = [()] * prompts
    for rank, part in enumerate(parts):
        texts[rank :: len(parts)] = part.texts
    kl = [part.kl for part in parts if part.kl is not None]
    judged = {}
    for name in parts[0].judged:
        said = [part.judged[name] for part in parts]
        values = {output: whole([one.values[output] for one in said]) for output in said[0].values}
        counts = sum((Counter(one.failures) for one in said), Counter())
        rejected = [one.rejected for one in said if one.rejected is not None]
        judged[name] = Judged(values, dict(counts), whole(rejected) if len(rejected) == len(said) else None)
    return PolicyAnswers(
        texts=tuple(texts),
        tokens=whole([part.tokens for part in parts]),
        truncated=whole([part.truncated for part in parts]),
        kl=whole(kl) if len(kl) == len(parts) else None,
        judged=judged,
    )
