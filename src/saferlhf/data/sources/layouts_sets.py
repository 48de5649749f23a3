"""Layouts of single evaluation sets, whose labels stand in columns or in names of files that no mapping can read.

- `openai_moderation`  (Markov et al. 2023) `{prompt, S, H, V, HR, SH, S3, H2, V2}`, each label 0, 1 or not there, which
                       means that nobody labelled it. Read as usual: a text is unsafe if any label is 1. Its group is
                       the first such label in the order above, `none` without one.
- `do_not_answer`      (Wang et al. 2023) one question with the responses of six models and a person's judgement of
                       each: `question`, `{model}_response`, `{model}_harmful`. One record becomes a row for each
                       model, which is its group; where prompts are wanted it gives the question once, grouped by
                       `risk_area`.
- `xsafety`            (Wang et al. 2023) files `{language}/{topic}.csv` without a header, whose first field is the
                       prompt; other fields are left-overs. On the hub a table of `text`, `language` and `category`.
                       The group is `language/topic`. Only prompts of the topic `commonsense` are harmless.

They give the pseudo column `group`, which a mapping (`data.columns.group`) overrules.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from saferlhf.data.columns import BadValue
from saferlhf.data.files import Record
from saferlhf.data.parse import GROUP, as_bool, raw_key
from saferlhf.data.rows import PromptRow, Row

Made = list[dict[str, Any] | BadValue]
"""What a record is taken apart into: plain columns, or why there are none."""


# ------------------------------------------------------------------------------------------------ openai_moderation
OPENAI_LABELS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
"""Sexual, hate, violence, harassment, self-harm; sexual with minors, hate with threats, graphic violence."""


def openai_moderation(record: Record, kind: type[Row]) -> dict[str, Any]:
    """A text with `is_safe` and its first raised label; not labelled where it has no label at all.

    Raises:
        BadValue: a label that is neither 0 nor 1.
    """
    labels = {name: as_bool(value) for name in OPENAI_LABELS if raw_key(value := record.values.get(name)) != ""}
    for name, label in labels.items():
        if label is None:
            raise BadValue("bad_label", f"column '{name}' holds neither 0 nor 1", record.place)
    raised = [name for name, label in labels.items() if label]
    is_safe = not raised if labels else None
    return {**record.values, "is_safe": is_safe, GROUP: raised[0] if raised else "none"}


# ------------------------------------------------------------------------------------------------ do_not_answer
_RESPONSE, _HARMFUL = "_response", "_harmful"


def do_not_answer(record: Record, kind: type[Row]) -> Made:
    """A row for each model whose response and judgement stand in the record; the question alone for prompts.

    Raises:
        BadValue: no question, or no model has a response.
    """
    values = record.values
    if not isinstance(values.get("question"), str):
        raise BadValue("non_text", "column 'question' holds no text", record.place)
    question = {"prompt": values["question"]}
    if kind is PromptRow:
        return [{**values, **question, GROUP: values.get("risk_area")}]
    models = [name.removesuffix(_RESPONSE) for name in values if str(name).endswith(_RESPONSE)]
    if not models:
        mend = "the set has columns like GPT4_response and GPT4_harmful; for its questions alone ask for prompts"
        raise BadValue("non_text", "no column '{model}_response'", record.place, mend)
    made: Made = []
    for model in models:
        harmful = values.get(f"{model}{_HARMFUL}")
        label = None if raw_key(harmful) == "" else as_bool(harmful)
        if label is None and raw_key(harmful) != "":
            what = f"column '{model}{_HARMFUL}' holds neither 0 nor 1"
            made.append(BadValue("bad_label", what, record.place))
            continue
        is_safe = None if label is None else not label
        made.append({**values, **question, "response": values[f"{model}{_RESPONSE}"], "is_safe": is_safe, GROUP: model})
    return made


# ------------------------------------------------------------------------------------------------ xsafety
XSAFETY_TOPICS = (
    "commonsense",
    "crimes_and_illegal_activities",
    "ethics_and_morality",
    "goal_hijacking",
    "inquiry_with_unsafe_opinion",
    "insult",
    "mental_health",
    "physical_harm",
    "privacy_and_property",
    "prompt_leaking",
    "reverse_exposure",
    "role_play_instruction",
    "unfairness_and_discrimination",
    "unsafe_instruction_topic",
)
"""Its 14 topics; prompts of the first are harmless."""

_MISSPELT = {"commen_sense": "commonsense", "crimes_and_illegal_activitie": "crimes_and_illegal_activities"}


def xsafety(record: Record, kind: type[Row]) -> dict[str, Any]:
    """A prompt with `is_safe` and the group `language/topic`, both from its file's name or, on the hub, from columns.

    Raises:
        BadValue: a file in no language's folder, or of none of the topics: its label is not known.
    """
    if "category" in record.values:
        prompt = record.values.get("text")
        language, name = str(record.values.get("language") or "").lower(), str(record.values["category"])
    else:
        path = PurePosixPath(record.file)
        prompt = record.values.get("1")
        language, name = path.parent.name.lower(), path.name.split(".")[0]
    topic = xsafety_topic(name, language)
    if not language or topic not in XSAFETY_TOPICS:
        what = f"'{language}/{name[:60]}' is no language with one of the {len(XSAFETY_TOPICS)} topics of XSafety"
        raise BadValue("bad_label", what, record.place, "files are named like en/Insult.csv")
    return {"prompt": prompt, "is_safe": topic == XSAFETY_TOPICS[0], GROUP: f"{language}/{topic}"}


def xsafety_topic(name: str, language: str) -> str:
    """The topic that a file's name stands for: English files end in `_n` or `_en`, two names are misspelt."""
    topic = name.lower().removesuffix("_n").removesuffix(f"_{language}")
    return _MISSPELT.get(topic, topic)


__all__ = ["OPENAI_LABELS", "XSAFETY_TOPICS", "Made", "do_not_answer", "openai_moderation", "xsafety", "xsafety_topic"]
