"""Samples wait behind a click, are nobody's choice, and cannot break the page; curves of the training beside them."""

from __future__ import annotations

import numpy as np
import pytest
from test_report import Page

from saferlhf.data.rows import Turn
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.report_curves import training_drawings
from saferlhf.evaluation.report_samples import WARNING, chosen_prompts, samples_section, withheld_section


def prompt_set(harmful: list[float]) -> PromptSet:
    ids = tuple(f"id{i}" for i in range(len(harmful)))
    return PromptSet(ids, tuple((Turn("user", f"question {i}?"),) for i in range(len(harmful))), np.array(harmful))


def answers(n: int, text: str = "answer {i}.{j}", k: int = 2, **outputs: float) -> PolicyAnswers:
    texts = tuple(tuple(text.format(i=i, j=j) for j in range(k)) for i in range(n))
    said = {"judge": Judged({name: np.full((n, k), value) for name, value in outputs.items()})}
    return PolicyAnswers(texts, np.full((n, k), 7), np.arange(n * k).reshape(n, k) == 0, np.full((n, k), 0.25), said)


# ------------------------------------------------------------------------------------------------ which
def test_the_choice_hangs_on_ids_alone() -> None:
    prompts = prompt_set([np.nan] * 50)
    chosen = chosen_prompts(prompts, 5)
    assert len(chosen) == len(set(chosen)) == 5 and chosen == sorted(chosen)
    backwards = PromptSet(prompts.ids[::-1], prompts.prompts[::-1], prompts.harmful[::-1])
    assert {backwards.ids[i] for i in chosen_prompts(backwards, 5)} == {prompts.ids[i] for i in chosen}
    assert set(chosen) <= set(chosen_prompts(prompts, 9))
    assert chosen != list(range(5))


@pytest.mark.parametrize(
    ("bad", "good", "most", "expected"), [(20, 20, 6, 3), (20, 1, 6, 5), (1, 20, 6, 1), (2, 2, 9, 2), (20, 20, 5, 3)]
)
def test_harmful_and_other_prompts_take_turns(bad: int, good: int, most: int, expected: int) -> None:
    prompts = prompt_set([1.0] * bad + [0.0] * good)
    chosen = chosen_prompts(prompts, most)
    assert sum(prompts.harmful[chosen]) == expected
    assert len(chosen) == min(most, bad + good)


# ------------------------------------------------------------------------------------------------ what
def test_all_stands_in_a_closed_element() -> None:
    policies = {"policy": answers(3, reward=1.5, cost=np.nan), "baseline": answers(3, "other {i}.{j}")}
    section = samples_section(prompt_set([1, 0, np.nan]), policies)
    before, _, inside = section.partition('<details class="samples">')
    assert inside.endswith("</details></section>")
    summary, _, shown = inside.partition("</summary>")
    assert WARNING in summary
    for text in ("question", "answer", "other"):
        assert text not in before + summary and text in shown
    text = Page(section).text
    assert all(f"answer {i}.0" in text and f"other {i}.0" in text for i in range(3)) and "answer 0.1" not in text
    assert "judge: reward 1.5, cost no score · KL 0.25 nats · 7 tokens, cut off" in text
    assert "id0 · asks for harm" in text and "id1 · benign" in text


def test_text_is_escaped_and_cut_with_a_count() -> None:
    long = "<b>&amp;</details>" * 100
    section = samples_section(prompt_set([0]), {"<i>policy": answers(1, long)}, heading="<h>", longest=50)
    assert Page(section).open == []
    assert "<b>" not in section and "<i>" not in section and section.count("</details>") == 1
    assert long[:50] + " … 1,750 more characters" in Page(section).text
    assert "(empty)" in samples_section(prompt_set([0]), {"policy": answers(1, " \n")})


def test_harm_categories_that_a_judge_does_not_see_are_left_out() -> None:
    outputs = {"safe": 0.0, "category/drugs": 0.0, "category/fraud": 1.0}
    section = samples_section(prompt_set([0]), {"policy": answers(1, **outputs)})
    assert "judge: safe 0, category/fraud 1" in section and "drugs" not in section


def test_nothing_to_show() -> None:
    assert samples_section(prompt_set([]), {"policy": answers(0)}) == ""
    assert samples_section(prompt_set([0]), {}) == ""
    assert "samples.jsonl" in withheld_section("<s>") and "<s>" not in withheld_section("<s>")


# ------------------------------------------------------------------------------------------------ training
def test_curves_of_a_constraint() -> None:
    steps = [(i, float(i)) for i in range(5)]
    curves = {f"train/{name}": steps for name in ("lambda", "kl", "kl_per_token", "mean_reward", "mean_cost", "loss")}
    drawings = training_drawings(curves, [0.5])
    titles = [svg.split('aria-label="')[1].split('"')[0] for svg in drawings]
    kl = "KL to the reference over training, nats"
    assert titles == ["lambda over training", kl, "reward over training", "cost over training"]
    assert "threshold 0.5" in drawings[3] and "threshold" not in "".join(drawings[:3])
    assert "rollout" in drawings[0]
    assert training_drawings({"train/loss": steps, "train/kl": []}) == []
    assert len(training_drawings({"train/mean_reward": steps, "train/kl": steps})) == 2
