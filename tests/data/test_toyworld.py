"""The toy world's rows: seeded, split by prompt, near the public data's statistics, and no straw man."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from saferlhf.data.rows import PreferencePair, QuestionAnswer
from saferlhf.data.toyworld import (
    Annotators,
    damaged_replies,
    demonstrations,
    is_harmful_request,
    judge,
    preference_pairs,
    prompt_space,
    prompts,
    question_answers,
    split_of,
    statistics,
    vocabulary,
)
from saferlhf.data.toyworld import words as w
from saferlhf.data.toyworld.annotators import perceived_harmlessness
from saferlhf.data.toyworld.replies import DAMAGES
from saferlhf.errors import UserError

SEED = 5


@pytest.fixture(scope="module")
def train() -> list[PreferencePair]:
    return preference_pairs(12_000, "train", SEED)


@pytest.fixture(scope="module")
def test() -> list[PreferencePair]:
    return preference_pairs(3_000, "test", SEED)


# ------------------------------------------------------------------------------------------------ rows
def test_vocabulary_is_fixed_and_covers_every_word(train: list[PreferencePair]) -> None:
    words = vocabulary()
    assert words == vocabulary() and len(set(words)) == len(words) and 200 <= len(words) <= 1000
    known = set(words)
    for pair in train[:2000]:
        for text in (pair.prompt[0].content, pair.response_0, pair.response_1):
            assert known.issuperset(text.split())
    for _, row in damaged_replies(50, "val", SEED):
        assert known.issuperset(row.response.split())
    assert not set(w.PLAIN_DEEDS) & set(w.DARK_DEEDS) and not set(w.GOODS) & set(w.TOOLS)


def test_longer_list_extends_shorter_and_seed_matters() -> None:
    makers = (preference_pairs, demonstrations, question_answers, prompts)
    for make in makers:
        assert make(40, "val", 3)[:15] == make(15, "val", 3)
        assert make(15, "val", 3) != make(15, "val", 4)
    assert damaged_replies(6, "test", 3)[: 2 * (1 + len(DAMAGES))] == damaged_replies(2, "test", 3)


def test_rows_are_equal_in_another_process() -> None:
    code = "from saferlhf.data.toyworld import *; print([r.id for r in preference_pairs(20, 'train', 9)])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    assert out.stdout.strip() == str([row.id for row in preference_pairs(20, "train", 9)])


def test_rows_stay_what_they_were() -> None:
    """A change here changes every number measured on the toy world: state it in the change log."""
    row = preference_pairs(1, "train", 0)[0]
    assert row.prompt[0].content == "please jolimble fawneen dormilk with jangette at fennmere ."
    assert row.id == "2289a5e52b212cbb"
    assert (row.better_response_id, row.safer_response_id, row.single_response_id) == (1, 0, 0)


def test_splits_share_no_prompt_whatever_the_seed() -> None:
    seen = {
        split: {r.prompt for seed in (0, 1) for r in prompts(1500, split, seed)} for split in ("train", "val", "test")
    }
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    for split, found in seen.items():
        assert all(split_of(prompt[0].content) == split for prompt in found)
        assert len(found) > 0.99 * 3000


def test_prompt_space_is_counted_right_and_holds_millions() -> None:
    assert prompt_space() > 10_000_000
    two_slots = {
        request.format(deed="a", hue="b", good="c", place=p, tool=t)
        for request in w.REQUESTS
        for p in "de"
        for t in "fg"
    }
    assert len(two_slots) == len(w.REQUESTS) * 4  # no two templates render alike
    deeds = set(w.PLAIN_DEEDS + w.TWO_FACED_DEEDS + w.DARK_DEEDS)
    expected = len(w.REQUESTS) * len(deeds)
    for slot in (w.HUES, w.GOODS, w.PLACES, w.TOOLS):
        assert len(set(slot)) == len(slot)
        expected *= len(slot)
    assert prompt_space() == expected


def test_labels_are_the_oracles_and_the_rule_holds(train: list[PreferencePair]) -> None:
    for pair in train[:3000]:
        truths = judge(pair.prompt, pair.response_0), judge(pair.prompt, pair.response_1)
        assert (pair.is_response_0_safe, pair.is_response_1_safe) == (truths[0].is_safe, truths[1].is_safe)
        assert (pair.response_0_severity_level, pair.response_1_severity_level) == (
            truths[0].severity,
            truths[1].severity,
        )
        assert pair.response_0_harm_category == truths[0].harm_category
        assert pair.response_1_harm_category == truths[1].harm_category
        assert {pair.better_response_id, pair.safer_response_id, pair.single_response_id} <= {0, 1}
        assert pair.response_0 != pair.response_1 and pair.response_0 and pair.response_1
        if truths[0].is_safe != truths[1].is_safe:
            assert pair.safer_response_id == int(truths[1].is_safe)


def test_damaged_replies_come_next_to_intact_ones() -> None:
    rows = damaged_replies(300, "test", SEED)
    group = rows[: 1 + len(DAMAGES)]
    assert [kind for kind, _ in group] == ["intact", *DAMAGES]
    assert len({row.prompt for _, row in group}) == 1
    means = {
        kind: np.mean([judge(r.prompt, r.response).helpfulness for k, r in rows if k == kind])
        for kind in ("intact", *DAMAGES)
    }
    assert all(means["intact"] > means[kind] + 0.8 for kind in DAMAGES)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        prompts(3, "dev", 0)
    with pytest.raises(UserError, match="-1 rows"):
        preference_pairs(-1, "train", 0)


@pytest.mark.slow
def test_hundred_thousand_rows_in_seconds() -> None:
    start = time.process_time()
    assert len(preference_pairs(100_000, "train", 1)) == 100_000
    assert time.process_time() - start < 40  # 6 to 10 s on a free core


# ------------------------------------------------------------------------------------------------ statistics
@pytest.mark.parametrize(
    ("name", "public", "tolerance"),
    [
        ("replies/safe", 0.485, 0.03),
        ("severity/minor", 0.12, 0.03),
        ("severity/moderate", 0.743, 0.04),
        ("severity/severe", 0.138, 0.04),
        ("pairs/both_safe", 0.412, 0.03),
        ("pairs/one_safe", 0.146, 0.03),
        ("pairs/none_safe", 0.442, 0.03),
        ("pairs/better_is_safer", 0.759, 0.03),
        ("replies/categories_per_unsafe", 2.02, 0.15),
        ("strata/category_differs", 0.174, 0.06),
        ("strata/severity_differs", 0.080, 0.03),
        ("agreement/better", 0.690, 0.025),
        ("agreement/safer", 0.6653, 0.025),
        ("agreement/single", 0.6165, 0.025),
    ],
)
def test_statistics_are_near_the_public_data(
    shares: dict[str, float], name: str, public: float, tolerance: float
) -> None:
    assert shares[name] == pytest.approx(public, abs=tolerance)


@pytest.fixture(scope="module")
def shares(train: list[PreferencePair]) -> dict[str, float]:
    return statistics(train)


def test_categories_occur_together_as_in_the_public_data(train: list[PreferencePair]) -> None:
    found = [c for p in train for c in (p.response_0_harm_category, p.response_1_harm_category) if c]
    white_collar = [c for c in found if "White-Collar Crime" in c]
    assert sum("Economic Crime" in c for c in white_collar) / len(white_collar) > 0.7  # public: 0.84
    privacy = [c for c in found if "Privacy Violation" in c]
    assert 0.3 < sum("Cybercrime" in c for c in privacy) / len(privacy) < 0.7  # public: 0.58
    assert {name for c in found for name in c} == set(w.TRICKS.values())  # all 19


def test_ties_are_rare(shares: dict[str, float]) -> None:
    assert shares["ties/harmlessness"] < 0.06
    assert shares["ties/helpfulness"] < 0.18


def test_demonstrations_are_a_weak_start() -> None:
    rows = demonstrations(3000, "train", SEED)
    truths = [judge(row.prompt, row.response) for row in rows]
    harmful = [is_harmful_request(row.prompt) for row in rows]
    assert 0.45 < np.mean([not t.is_safe for t in truths]) < 0.56
    benign_refusals = np.mean([t.is_refusal for t, h in zip(truths, harmful, strict=True) if not h])
    assert 0.02 < benign_refusals < 0.08
    assert 0.8 < np.mean([t.helpfulness for t in truths]) < 1.5
    assert len({row.response for row in rows}) > 0.95 * len(rows)  # bare refusals repeat


# ------------------------------------------------------------------------------------------------ no straw man
def _counts(pairs: list[PreferencePair]) -> torch.Tensor:
    """Differences of word counts, response 1 minus response 0, and of lengths: (pairs, words + 1)."""
    index = {word: i for i, word in enumerate(vocabulary())}
    out = torch.zeros(len(pairs), len(index) + 1)
    for row, pair in enumerate(pairs):
        for sign, reply in ((-1, pair.response_0), (1, pair.response_1)):
            tokens = reply.split()
            for word in tokens:
                out[row, index[word]] += sign
            out[row, -1] += sign * len(tokens) / 10
    return out


def _logistic_regression(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    weights = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, target)
        loss = loss + 5.0 / len(target) * weights.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _gaps(pairs: list[PreferencePair], name: str) -> torch.Tensor:
    return torch.tensor(
        [getattr(judge(p.prompt, p.response_1), name) - getattr(judge(p.prompt, p.response_0), name) for p in pairs]
    )


@pytest.mark.parametrize(("truth", "label", "most"), [("helpfulness", "better", 0.65), ("harmlessness", "safer", 0.75)])
@pytest.mark.parametrize("noisy", [True, False])
def test_bag_of_words_orders_few_pairs(
    train: list[PreferencePair], test: list[PreferencePair], truth: str, label: str, most: float, noisy: bool
) -> None:
    gaps = _gaps(train, truth)
    target = torch.tensor([float(getattr(p, f"{label}_response_id")) for p in train]) if noisy else (gaps > 0).float()
    keep = torch.ones_like(gaps, dtype=torch.bool) if noisy else gaps != 0
    weights = _logistic_regression(_counts(train)[keep], target[keep])
    unseen = _gaps(test, truth)
    right = ((_counts(test) @ weights > 0) == (unseen > 0))[unseen != 0].float().mean()
    assert 0.5 < right <= most


def test_truth_itself_orders_noisy_labels_far_better_than_chance(train: list[PreferencePair]) -> None:
    gaps = _gaps(train, "helpfulness")
    labels = torch.tensor([p.better_response_id for p in train])
    assert ((gaps > 0) == (labels == 1))[gaps != 0].float().mean() > 0.75


def test_single_replies_carry_their_labels() -> None:
    for row in question_answers(200, "test", SEED):
        assert isinstance(row, QuestionAnswer)
        truth = judge(row.prompt, row.response)
        assert (row.is_safe, row.severity_level, row.harm_category) == (
            truth.is_safe,
            truth.severity,
            truth.harm_category,
        )


# ------------------------------------------------------------------------------------------------ who labels
LABELS = ("better_response_id", "safer_response_id", "single_response_id")
SAFETY = tuple(
    name.format(side)
    for side in (0, 1)
    for name in ("is_response_{}_safe", "response_{}_severity_level", "response_{}_harm_category")
)


def fingerprint(rows: list[PreferencePair] | list[QuestionAnswer]) -> str:
    """Of everything in the rows."""

    def plain(row: PreferencePair | QuestionAnswer) -> list[tuple[str, object]]:
        return sorted((k, sorted(v) if isinstance(v, frozenset) else v) for k, v in asdict(row).items())

    lines = [repr((row.id, plain(row))) for row in rows]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("annotators", [None, Annotators(), Annotators(0.5, 1.0, 0.0)])
def test_the_rows_of_the_usual_annotators_stay_what_they_are(annotators: Annotators | None) -> None:
    """Other rows make all numbers of the docs old: whoever changes the world measures them anew."""
    given = {} if annotators is None else {"annotators": annotators}
    assert fingerprint(preference_pairs(2000, "train", 0, **given)) == "b377ac117d813c9a"
    assert fingerprint(preference_pairs(2000, "test", 7, **given)) == "8f73c8805728723d"
    assert fingerprint(question_answers(1000, "train", 0, **given)) == "4665339b54b659f0"
    assert fingerprint(question_answers(1000, "test", 7, **given)) == "0339cad6c2208617"


def test_replies_do_not_depend_on_who_labels_them() -> None:
    usual = preference_pairs(800, "train", SEED)
    for who in (Annotators(0.9), Annotators(sharpness=0.3), Annotators(safety_error=0.3)):
        others = preference_pairs(800, "train", SEED, who)
        for one, other in zip(usual, others, strict=True):
            assert (one.id, one.prompt, one.response_0) == (other.id, other.prompt, other.response_0)
            assert one.response_1 == other.response_1
        changed = {
            name
            for one, other in zip(usual, others, strict=True)
            for name in (*LABELS, *SAFETY)
            if getattr(one, name) != getattr(other, name)
        }
        assert changed & set(LABELS), "and their labels do"
        assert bool(changed & set(SAFETY)) == (who.safety_error > 0)
        # a mistake about safety moves no other annotator's eye
        assert ("better_response_id" in changed) == (who.sharpness < 1)
    mistaken = question_answers(300, "train", SEED, Annotators(safety_error=0.3))
    right = question_answers(300, "train", SEED)
    assert [(row.id, row.response) for row in mistaken] == [(row.id, row.response) for row in right]
    assert question_answers(300, "train", SEED, Annotators(0.9, 0.3)) == right, "only mistakes change single replies"
    assert mistaken[:100] == question_answers(100, "train", SEED, Annotators(safety_error=0.3))


def test_the_weight_of_safety_in_the_single_label() -> None:
    """Only the single label heeds it, and the more it weighs the more the label follows harmlessness."""
    by_weight = {weight: preference_pairs(3000, "train", SEED, Annotators(weight)) for weight in (0.0, 0.3, 0.7, 1.0)}
    usual = preference_pairs(3000, "train", SEED)
    truths = [(judge(p.prompt, p.response_0), judge(p.prompt, p.response_1)) for p in usual]

    def share(rows: list[PreferencePair], quantity: str) -> float:
        """Of single labels that name the reply with more of it, where there is one."""
        gaps = [getattr(second, quantity) - getattr(first, quantity) for first, second in truths]
        found = [(row.single_response_id == 1) == (gap > 0) for row, gap in zip(rows, gaps, strict=True) if gap]
        return float(np.mean(found))

    harmless = {weight: share(rows, "harmlessness") for weight, rows in by_weight.items()}
    safe = [share(rows, "is_safe") for rows in by_weight.values()]
    helpful = [share(rows, "helpfulness") for rows in by_weight.values()]
    assert harmless[1.0] > harmless[0.0] + 0.05 and harmless[0.7] > harmless[0.3]
    assert safe == sorted(safe) and safe[0] < 0.5 and safe[-1] > 0.95
    assert helpful == sorted(helpful, reverse=True) and helpful[0] > helpful[-1] + 0.1
    for rows in by_weight.values():
        blind = [replace(row, single_response_id=None) for row in rows]
        assert blind == [replace(row, single_response_id=None) for row in usual]


def test_blunt_annotators_agree_less_with_truth(train: list[PreferencePair]) -> None:
    rights = []
    for sharpness in (0.0, 0.5, 1.0, 3.0):
        rows = preference_pairs(3000, "train", SEED, Annotators(sharpness=sharpness))
        gaps = _gaps(train[:3000], "helpfulness")
        labels = torch.tensor([row.better_response_id for row in rows])
        rights.append(float(((gaps > 0) == (labels == 1))[gaps != 0].float().mean()))
    assert rights[0] == pytest.approx(0.5, abs=0.04), "they see nothing"
    assert rights == sorted(rights)
    assert rights[-1] > 0.9


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_mistakes_about_safety(share: float) -> None:
    """So many labels of safety are wrong, of safe replies as of unsafe ones; each row stays consistent in itself."""
    who = Annotators(safety_error=share)
    singles = question_answers(3000, "train", SEED, who)
    pairs = preference_pairs(1500, "train", SEED, who)
    labels = [(row.prompt, row.response, row.is_safe, row.severity_level, row.harm_category) for row in singles]
    for pair in pairs:
        said = [getattr(pair, name) for name in SAFETY]
        labels.append((pair.prompt, pair.response_0, *said[:3]))
        labels.append((pair.prompt, pair.response_1, *said[3:]))
        if pair.is_response_0_safe != pair.is_response_1_safe:
            assert pair.safer_response_id == int(bool(pair.is_response_1_safe)), "the rule holds for labels"
    wrong: dict[bool, list[bool]] = {True: [], False: []}
    severities, categories = set[int](), set[str]()
    for prompt, reply, is_safe, severity, found in labels:
        truth = judge(prompt, reply)
        assert is_safe == (severity == 0) == (not found)
        wrong[truth.is_safe].append(is_safe != truth.is_safe)
        if is_safe == truth.is_safe:
            assert (severity, found) == (truth.severity, truth.harm_category)
        elif truth.is_safe:
            severities.add(severity or 0)
            categories |= found or frozenset()
    for mistakes in wrong.values():
        error = np.sqrt(share * (1 - share) / len(mistakes))
        assert np.mean(mistakes) == pytest.approx(share, abs=4 * error)
    assert severities == {1, 2, 3}
    assert len(categories) == 19


def test_a_mistake_about_safety_changes_the_label_not_the_look_of_a_reply(train: list[PreferencePair]) -> None:
    for pair in train[:200]:
        truth = judge(pair.prompt, pair.response_0)
        taken = Annotators(safety_error=0.999999).safety(random.Random(1), truth)
        assert taken.is_safe != truth.is_safe
        assert perceived_harmlessness(taken) == pytest.approx(perceived_harmlessness(truth))
        assert (taken.helpfulness, taken.kind, taken.is_refusal) == (truth.helpfulness, truth.kind, truth.is_refusal)
        assert Annotators().safety(random.Random(1), truth) is truth


def test_labels_like_those_of_beavertails(train: list[PreferencePair], shares: dict[str, float]) -> None:
    """Published agreement of its annotators: 62.4% on helpfulness, 60.9% on harmlessness, 81.7% on safety."""
    found = statistics(train[:6000], Annotators(sharpness=0.7, safety_error=0.1))
    assert found["agreement/better"] == pytest.approx(0.624, abs=0.02)
    assert found["agreement/safer"] == pytest.approx(0.609, abs=0.02)
    assert found["agreement/safety"] == pytest.approx(0.817, abs=0.015)
    assert shares["agreement/safety"] == 1.0
    # what the pairs are does not depend on who is asked
    usual = statistics(train[:6000])
    assert {k: v for k, v in found.items() if "agreement" not in k} == {
        k: v for k, v in usual.items() if "agreement" not in k
    }
