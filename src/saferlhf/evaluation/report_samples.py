"""Samples of policies for the report page, behind a click and a content warning.

A number about safety convinces nobody who has not seen responses, and yet nobody must see harm by opening a page: all
samples stand in a `details` element that is closed, and a closed one shows its warning alone, on the screen and on
paper. Which prompts are shown depends on their ids alone (the smallest SHA-256 first), so that it is the same choice
for every policy and every run, and nobody picked it; where it is known which prompts ask for harm, these and the others
take turns.

All text is escaped, control characters become visible (`report_style.visible`), and long text is cut with its count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from saferlhf.data.rows import Prompt
    from saferlhf.evaluation.policy_answers import PolicyAnswers, PromptSet

MOST = 12
"""Prompts that are shown, with one response of each policy."""

LONGEST = 1_500
"""Characters of a text that are shown."""

_CATEGORY = "category/"  # what a judge's outputs by harm category begin with

WARNING = (
    "Content warning: prompts and responses are shown as they are and may be harmful, hateful or disturbing, and wrong."
)

SAMPLES_STYLE = """
.samples > summary { border: 1px solid var(--series-2); border-radius: .5rem; padding: .7rem 1rem; font-weight: 400; }
.sample { border-top: 1px solid var(--line); padding-top: .8rem; margin-top: 1rem; }
.sample h3 { margin-bottom: .4rem; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); border: 1px solid var(--line);
  border-radius: .5rem; padding: .6rem .8rem; margin: .2rem 0 .5rem; unicode-bidi: isolate; }
.said { font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.responses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 1rem; }
.responses > div { min-width: 0; }
"""


def samples_section(
    prompts: PromptSet,
    policies: Mapping[str, PolicyAnswers],
    *,
    heading: str = "Samples",
    most: int = MOST,
    longest: int = LONGEST,
) -> str:
    """HTML of the section; "" without prompts or policies.

    Args:
        prompts: n prompts.
        policies: name -> its answers to them; the first response to each prompt is shown.
        heading: of the section.
        most: prompts that are shown.
        longest: characters of a text that are shown.
    """
    chosen = chosen_prompts(prompts, most)
    if not chosen or not policies:
        return ""
    shown = "".join(_sample(prompts, policies, i, longest) for i in chosen)
    count = f"{len(chosen):,} of {len(prompts):,} prompts"
    how = (
        f"{count} with the first response of each policy, chosen by a hash of their ids and not by what they hold;"
        " all of them are in samples.jsonl beside this page."
    )
    return (
        f"<section><h2>{escape(heading)}</h2>"
        f'<details class="samples"><summary><strong>{escape(WARNING)}</strong> Show {escape(count)}.</summary>'
        f'<p class="note">{escape(how)}</p>{shown}</details></section>'
    )


def withheld_section(heading: str = "Samples") -> str:
    """HTML that stands where samples would, in a page that leaves this machine."""
    return (
        f'<section><h2>{escape(heading)}</h2><p class="note">Prompts and responses stay on the machine that wrote'
        " them: this page was given to a tracking server. They are in samples.jsonl of the evaluation's folder.</p>"
        "</section>"
    )


def chosen_prompts(prompts: PromptSet, most: int = MOST) -> list[int]:
    """Numbers of the prompts to be shown, in the order of the rows.

    Args:
        prompts: n prompts.
        most: how many at most; harmful and other prompts take turns until one kind is used up.
    """
    order = sorted(
        range(len(prompts)), key=lambda i: hashlib.sha256(prompts.ids[i].encode("utf-8", "replace")).digest()
    )
    harmful = [i for i in order if prompts.harmful[i] == 1]
    others = [i for i in order if prompts.harmful[i] != 1]
    first = min(len(harmful), max(most - most // 2, most - len(others)))
    return sorted(harmful[:first] + others[: max(most - first, 0)])


def _sample(prompts: PromptSet, policies: Mapping[str, PolicyAnswers], i: int, longest: int) -> str:
    kind = "" if np.isnan(prompts.harmful[i]) else " · asks for harm" if prompts.harmful[i] == 1 else " · benign"
    responses = "".join(
        f'<div><div class="said">{escape(name)}</div>{_text(answers.texts[i][0], longest)}'
        f'<div class="said">{escape(_said(answers, i))}</div></div>'
        for name, answers in policies.items()
        if answers.shape[1]
    )
    return (
        f'<article class="sample"><h3>{escape(prompts.ids[i])}{kind}</h3>{_conversation(prompts.prompts[i], longest)}'
        f'<div class="responses">{responses}</div></article>'
    )


def _conversation(prompt: Prompt, longest: int) -> str:
    return "".join(f'<div class="said">{escape(turn.role)}</div>{_text(turn.content, longest)}' for turn in prompt)


def _text(text: str, longest: int) -> str:
    """A text as it is, cut with the number of characters that are left out."""
    left_out = len(text) - longest
    if not text.strip():
        return '<div class="text"><span class="note">(empty)</span></div>'
    cut = f'<span class="note"> … {left_out:,} more characters</span>' if left_out > 0 else ""
    return f'<div class="text" dir="auto">{escape(text[:longest])}{cut}</div>'


def _said(answers: PolicyAnswers, i: int) -> str:
    """What the judges say of the first response, and how long it is."""
    parts = []
    for judge, said in answers.judged.items():
        first = {output: float(values[i, 0]) for output, values in said.values.items()}
        # of harm categories those that a judge sees
        shown = [o for o, value in first.items() if value != 0 or not o.startswith(_CATEGORY)]
        parts.append(f"{judge}: {', '.join(f'{output} {_number(first[output])}' for output in shown)}")
    if answers.kl is not None:
        parts.append(f"KL {_number(answers.kl[i, 0])} nats")
    parts.append(f"{answers.tokens[i, 0]:,} tokens{', cut off' if answers.truncated[i, 0] else ''}")
    return " · ".join(parts)


def _number(value: float) -> str:
    return "no score" if np.isnan(value) else f"{value:.3g}"
