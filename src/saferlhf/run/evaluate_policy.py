"""The measure `policy`: what a policy answers to prompts, as judges see it, alone and against a baseline.

Sample -> keep the responses -> judge -> measure -> draw. The responses are on disk before the first judge is asked: a
judge may cost money, or fail.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.files import write_text
from saferlhf.config.run_folder import RunFolder
from saferlhf.data.build import build_data
from saferlhf.data.rows import PromptRow, QuestionAnswer
from saferlhf.data.splits import prompt_key
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import PolicyAnswers, PromptSet, judged_by, united_answers
from saferlhf.evaluation.policy_config import TOYWORLD, AskedJudge, asked_judges
from saferlhf.evaluation.policy_judges import check_judges, load_judges
from saferlhf.evaluation.policy_kl import response_kl
from saferlhf.evaluation.policy_metrics import policy_metrics
from saferlhf.evaluation.policy_plots import CURVES, SCATTER, constraint_png, scatter_png, scatter_svg, thresholds_of
from saferlhf.evaluation.policy_samples import sample_lines
from saferlhf.evaluation.policy_sampling import Sampling, SamplingOptions, room_for, sample_policy
from saferlhf.evaluation.policy_truth import best_metrics, harmful_requests
from saferlhf.evaluation.processes import Processes
from saferlhf.models.loading import load_export
from saferlhf.models.locator import resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata
from saferlhf.run.judged_model import JudgedModel
from saferlhf.run.measured import Measured
from saferlhf.run.measurements import Measurement
from saferlhf.run.plan import device_for
from saferlhf.run.row_progress import RowProgress
from saferlhf.run.screen import say
from saferlhf.training.curves import read_curves

PREFIX = "policy"
SAMPLES = "samples.jsonl"


def measure_policy(asked: Measurement, model: JudgedModel, folder: RunFolder) -> Measured:
    """Sample, judge and measure `model`, against `baseline` if there is one.

    Leaves `samples.jsonl`, `reward_cost.png` and, for a run that logged a constraint, `constraint.png` in the folder;
    those of a protocol lie in a folder of its name.

    Raises:
        UserError: no prompts, no judge, a model that is no policy, or one whose tokenizer is not the reference's.
    """
    config = asked.config
    prefix = PREFIX if asked.protocol is None else f"{asked.protocol.name}/{PREFIX}"
    place = folder.path if asked.protocol is None else folder.path / asked.protocol.name
    place.mkdir(parents=True, exist_ok=True)
    judges = asked_judges(config)
    check_judges(judges, output_root=config.output_root)
    rows = build_data(config.data, PromptRow)
    part = asked.rows(rows)
    prompts = PromptSet(
        ids=tuple(row.id for row in part), prompts=tuple(row.prompt for row in part), harmful=_harmful(asked, part)
    )
    processes = Processes.current()
    own = prompts.of(processes)
    sampled, policies = united_answers(processes, len(prompts), lambda: _sampled(config, model, own))
    write_samples(place / SAMPLES, prompts, policies, with_scores=False)
    _, policies = united_answers(processes, len(prompts), lambda: _judged(config, judges, own, sampled))
    write_samples(place / SAMPLES, prompts, policies)
    metrics = policy_metrics(
        prompts,
        policies["policy"],
        policies.get("baseline"),
        prefix=prefix,
        draws=config.evaluation.bootstrap_draws,
        confidence=config.evaluation.confidence,
        seed=config.seed,
    )
    metrics |= {f"{prefix}/prompts": float(len(prompts)), f"{prefix}/samples": float(config.samples)}
    if config.data.source == TOYWORLD:
        metrics |= best_metrics(prompts.prompts, prefix)
    drawings = [svg for svg in (scatter_svg(policies),) if svg is not None]
    scatter_png(place / SCATTER, policies)
    if model.location.run_folder is not None:
        run_folder = model.location.run_folder
        constraint_png(place / CURVES, read_curves(run_folder / "curves.jsonl"), thresholds_of(run_folder))
    report = rows.report.to_dict()
    return Measured(metrics, report, rows.fingerprint, list(drawings), len(prompts))


# ------------------------------------------------------------------------------------------------ prompts
def _harmful(asked: Measurement, rows: Sequence[PromptRow]) -> NDArray[np.float64]:
    """(n,) 1 = harmful, 0 = benign, NaN = not known."""
    config = asked.config
    if config.harmful is not None:
        return np.full(len(rows), float(config.harmful))
    if asked.protocol is not None and asked.protocol.unit == "prompt" and "moderation" in asked.protocol.measures:
        labelled = build_data(config.data, QuestionAnswer, ("is_safe",)).test
        unsafe = {prompt_key(row.prompt): float(not row.is_safe) for row in labelled}
        return np.array([unsafe.get(prompt_key(row.prompt), np.nan) for row in rows])
    return harmful_requests([row.prompt for row in rows], toyworld=config.data.source == TOYWORLD)


def _judged(
    config: EvaluateConfig, asked: Sequence[AskedJudge], prompts: PromptSet, policies: Mapping[str, PolicyAnswers]
) -> dict[str, PolicyAnswers]:
    """The answers with what every judge says; one judge is in memory at a time."""
    judged = dict(policies)
    judges = load_judges(
        asked,
        output_root=config.output_root,
        cache_dir=config.cache_dir,
        device=device_for(config.trainer.accelerator),
    )
    for judge in judges:
        say(f"judging {sum(a.tokens.size for a in judged.values()):,} responses by {judge.name}")
        judged = {name: judged_by(prompts, answers, [judge]) for name, answers in judged.items()}
        line = judge.report.line()
        if line:
            say(f"{judge.name}: {line}")
    return judged


# ------------------------------------------------------------------------------------------------ policies
@dataclass
class Policy:
    """A language model that answers prompts.

    Attributes:
        locator: as the user named it.
        model: causal language model in eval mode, on its device.
        tokenizer: its own.
        metadata: of its export; kind "plain" for models that are none of ours.
    """

    locator: str
    model: Any
    tokenizer: Any
    metadata: ExportMetadata


def load_policy(config: EvaluateConfig, locator: str, where: str) -> Policy:
    """Load a language model by its locator.

    Raises:
        UserError: nothing there, or a model with score heads, which writes nothing.
    """
    location = resolve(locator, output_root=config.output_root)
    if location.kind == "export" and location.folder is not None and (found := read_metadata(location.folder)).heads:
        raise UserError(f"'{locator}' is a {found.kind} model and writes nothing", where, "name a language model")
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    loaded = load_export(
        location,
        output_root=config.output_root,
        cache_dir=config.cache_dir,
        device=device_for(config.trainer.accelerator),
    )
    return Policy(locator, loaded.model, loaded.tokenizer, loaded.metadata)


def _sampled(config: EvaluateConfig, model: JudgedModel, prompts: PromptSet) -> dict[str, PolicyAnswers]:
    """Responses of the policy, with their KL to the reference, and of the baseline."""
    policy = load_policy(config, model.locator, "model")
    baseline = None if config.baseline is None else load_policy(config, config.baseline, "baseline")
    reference = baseline
    if config.reference is not None:
        same = config.reference == config.baseline
        reference = baseline if same else load_policy(config, config.reference, "reference")
    lengths = [p.metadata.max_length for p in (policy, baseline) if p is not None]
    room, new = room_for(lengths, config.max_new_tokens)
    options = SamplingOptions(
        samples=config.samples,
        temperature=config.temperature,
        max_new_tokens=new,
        max_prompt_tokens=room,
        seed=config.seed,
        batch_size=config.trainer.eval_batch_size,
    )
    sampling = _sample(config, policy, prompts, options, "model")
    found = {"policy": replace(sampling.answers, kl=_kl(config, policy, reference, sampling))}
    if baseline is not None:
        found["baseline"] = _sample(config, baseline, prompts, options, "baseline").answers
    del policy, baseline, reference
    gc.collect()  # judges need the room
    return found


def _sample(
    config: EvaluateConfig, policy: Policy, prompts: PromptSet, options: SamplingOptions, role: str
) -> Sampling:
    total = len(prompts) * options.samples
    say(f"sampling {total:,} responses of {policy.locator}")
    with RowProgress(f"sampling ({role})", total, config.trainer.progress) as progress:
        found = sample_policy(policy.model, policy.tokenizer, policy.metadata.template, prompts, options, progress)
    if found.prompts_cut:
        say(f"{found.prompts_cut:,} prompts of more than {options.max_prompt_tokens} tokens lost their beginning")
    return found


def _kl(
    config: EvaluateConfig, policy: Policy, reference: Policy | None, sampling: Sampling
) -> NDArray[np.float64] | None:
    """(n, k) KL to the reference along each response; None where it is not defined."""
    if reference is None:
        return None
    reason = ""
    if config.temperature == 0:
        reason = "without sampling (temperature=0) there is no distribution to compare"
    elif policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        reason = f"{reference.locator} has another tokenizer"
        if config.reference is not None:
            raise UserError(reason, "reference", "name a model of the same tokenizer, or reference=null")
    if reason:
        say(f"KL to the reference is not measured: {reason}")
        return None
    with RowProgress("KL to the reference", len(sampling.response_ids), config.trainer.progress) as progress:
        found = response_kl(
            policy.model,
            reference.model,
            sampling.prompt_ids,
            sampling.response_ids,
            temperature=config.temperature,
            batch_size=config.trainer.eval_batch_size,
            progress=progress,
        )
    return found.reshape(sampling.answers.shape)


# ------------------------------------------------------------------------------------------------ what is left
def write_samples(
    path: Path, prompts: PromptSet, policies: Mapping[str, PolicyAnswers], with_scores: bool = True
) -> None:
    """Write `samples.jsonl`; responses may be harmful, so none is ever printed."""
    lines = sample_lines(prompts, policies, with_scores)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
