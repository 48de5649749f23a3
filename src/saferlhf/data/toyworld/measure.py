"""What the toy world holds: its statistics beside those of PKU-SafeRLHF, and the best that a policy can reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from saferlhf.data.rows import PreferencePair, Prompt, PromptRow, prompt_text
from saferlhf.data.toyworld import words as w
from saferlhf.data.toyworld.annotators import USUAL, Annotators, annotate
from saferlhf.data.toyworld.generate import row_rng
from saferlhf.data.toyworld.oracle import judge
from saferlhf.data.toyworld.replies import frame_of


@dataclass(frozen=True)
class BestPoint:
    """Means over prompts of the best reachable reply.

    Attributes:
        helpfulness, safe_rate, harmlessness: of the most helpful safe reply (safe_rate is 1).
        unsafe_helpfulness: of the most helpful reply, safe or not.
        unsafe_safe_rate: how often that one is safe.
    """

    helpfulness: float
    safe_rate: float
    harmlessness: float
    unsafe_helpfulness: float
    unsafe_safe_rate: float


def best_replies(prompt: str) -> tuple[str, str]:
    """The most helpful safe reply, and the most helpful reply of all, to a prompt of the toy world."""
    frame = frame_of(prompt)

    def steps(rows: tuple[tuple[str, ...], ...]) -> str:
        said = [f"{w.VERBS[i][0]} {thing} {rows[i][0]}" for i, thing in enumerate(frame.things)]
        return " ".join(said) + " ."

    comply = f"{w.OPENERS[0][0]} {steps(w.WORK_PARTS)} {w.CLOSERS[0][0]}"
    redirect = f"{w.OPENERS[0][0]} {steps(w.CALM_PARTS)} {w.CLOSERS[0][0]}"
    return (redirect if frame.harmful else comply), comply


def best_point(prompts: Iterable[str | Prompt | PromptRow]) -> BestPoint:
    """The best reachable (helpfulness, safe rate) over the prompts, with every reply safe, and without that bond."""
    texts = [_text(prompt) for prompt in prompts]
    safe = [judge(text, best_replies(text)[0]) for text in texts]
    free = [judge(text, best_replies(text)[1]) for text in texts]
    count = len(texts)
    return BestPoint(
        helpfulness=sum(truth.helpfulness for truth in safe) / count,
        safe_rate=sum(truth.is_safe for truth in safe) / count,
        harmlessness=sum(truth.harmlessness for truth in safe) / count,
        unsafe_helpfulness=sum(truth.helpfulness for truth in free) / count,
        unsafe_safe_rate=sum(truth.is_safe for truth in free) / count,
    )


def _text(prompt: str | Prompt | PromptRow) -> str:
    if isinstance(prompt, PromptRow):
        return prompt_text(prompt.prompt)
    return prompt if isinstance(prompt, str) else prompt_text(prompt)


def statistics(pairs: Sequence[PreferencePair], annotators: Annotators = USUAL) -> dict[str, float]:
    """Shares of a list of labelled pairs, named and defined as in the tables of PKU-SafeRLHF.

    `agreement/*`: two further annotators, independent of each other and of the labels, label every pair; the share of
    pairs on which their published labels are equal (the rule "safe ranks safer" applied, as in the data), and of
    replies on whose safety they agree.
    """
    count = len(pairs)
    totals: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        totals[name] = totals.get(name, 0.0) + value

    for index, pair in enumerate(pairs):
        truths = [judge(pair.prompt, pair.response_0), judge(pair.prompt, pair.response_1)]
        labels, verdicts = [], []
        for annotator in (0, 1):
            eyes = row_rng("safety agreement", annotator, pair.id, index)
            first, second = (annotators.safety(eyes, truth) for truth in truths)
            labels.append(annotate(row_rng("agreement", annotator, pair.id, index), first, second, annotators))
            verdicts.append([first.is_safe, second.is_safe])
        for name in ("better", "safer", "single"):
            add(f"agreement/{name}", getattr(labels[0], name) == getattr(labels[1], name))
        add("agreement/safety", sum(one == other for one, other in zip(*verdicts, strict=True)) / 2)
        safe = truths[0].is_safe + truths[1].is_safe
        add(("pairs/none_safe", "pairs/one_safe", "pairs/both_safe")[safe], 1)
        add("pairs/better_is_safer", pair.better_response_id == pair.safer_response_id)
        add("pairs/single_is_better", pair.single_response_id == pair.better_response_id)
        add("pairs/single_is_safer", pair.single_response_id == pair.safer_response_id)
        add("pairs/better_is_second", pair.better_response_id == 1)
        add(_stratum(truths), 1)
        add("ties/helpfulness", truths[0].helpfulness == truths[1].helpfulness)
        add("ties/harmlessness", truths[0].harmlessness == truths[1].harmlessness)
    shares = {name: value / count for name, value in totals.items()}
    return dict(sorted({**shares, **_reply_statistics(pairs)}.items()))


def _stratum(truths: list) -> str:
    first, second = truths
    if first.is_safe != second.is_safe:
        return "strata/safety_differs"
    if first.severity != second.severity:
        return "strata/severity_differs"
    return "strata/category_differs" if first.harm_category != second.harm_category else "strata/no_difference"


def _reply_statistics(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    severities: list[int] = []
    categories: dict[str, int] = {}
    labels = 0
    for pair in pairs:
        for severity, found in (
            (pair.response_0_severity_level, pair.response_0_harm_category),
            (pair.response_1_severity_level, pair.response_1_harm_category),
        ):
            severities.append(severity or 0)
            for name in found or ():
                categories[name] = categories.get(name, 0) + 1
                labels += 1
    unsafe = sum(severity > 0 for severity in severities)
    out = {"replies/safe": 1.0 - unsafe / len(severities), "replies/categories_per_unsafe": labels / max(unsafe, 1)}
    for level, name in ((1, "minor"), (2, "moderate"), (3, "severe")):
        out[f"severity/{name}"] = sum(severity == level for severity in severities) / max(unsafe, 1)
    out.update({f"category/{name}": seen / len(severities) for name, seen in categories.items()})
    return out
