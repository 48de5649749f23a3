"""Final measurements of a supervised policy: likelihood of held-out responses, and what it writes itself.

On the toy world the sampled responses are judged by ground truth, so that later policies have a base line. Elsewhere
they go to `samples.jsonl` unread: nobody here can say how good they are, and they may be harmful, so none is printed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saferlhf.data.loader import EvalLoader
from saferlhf.data.templates import end_id, pad_id
from saferlhf.evaluation.likelihood import evaluate_likelihood
from saferlhf.evaluation.policy import evaluate_policy_against_truth
from saferlhf.evaluation.score import evaluating
from saferlhf.rollout.generate import generate
from saferlhf.rollout.prompts import tokenize_prompts
from saferlhf.run.measure import measured_splits
from saferlhf.run.rows import first_rows
from saferlhf.run.stages import Evaluation, PreparedRun
from saferlhf.tasks.scoring import gather

SAMPLES = {"toyworld": 400, "file": 16, "mix": 16}
"""Responses sampled at the end, by source of the rows."""


def measure_sft(prepared: PreparedRun) -> Evaluation:
    """Likelihood on validation and test rows, and samples."""
    metrics: dict[str, float] = {}
    for split, data in measured_splits(prepared):
        metrics |= _likelihood(prepared, split, data)
    samples, more = _samples(prepared)
    return Evaluation(metrics | more, [], samples)


def _likelihood(prepared: PreparedRun, split: str, data: Any) -> dict[str, float]:
    config, task = prepared.config, prepared.task
    assert task.model is not None
    device = next(task.model.parameters()).device
    outputs, order = [], []
    with evaluating(task.model, autocast=config.trainer.precision != "32-true"):
        for item in EvalLoader(data, batch_size=config.trainer.eval_batch_size):
            outputs.append(task.outputs(item.batch.to(device)))
            order.append(item.indices)
    place = np.argsort(np.concatenate(order))
    return evaluate_likelihood(
        data.rows,
        gather(outputs, "nll_sum")[place],
        gather(outputs, "tokens")[place],
        prefix=split,
        draws=config.evaluation.bootstrap_draws,
        confidence=config.evaluation.confidence,
        seed=config.seed,
    )


def _samples(prepared: PreparedRun) -> tuple[list[dict[str, Any]], dict[str, float]]:
    config, tokenizer = prepared.config, prepared.tokenizer
    test: Any = first_rows(prepared.encoded.test, config.evaluation.max_rows)
    rows = list(test.rows)[: SAMPLES[config.data.source]]
    if not rows:
        return [], {}
    encoder = prepared.encoded.encoder
    room = config.backbone.max_length // 2
    assert prepared.task.model is not None
    rollout = generate(
        prepared.task.model,
        tokenize_prompts(rows, encoder.template, tokenizer, max_prompt_tokens=room),
        seed=config.seed,
        max_new_tokens=min(room, 128),
        eos_token_id=end_id(tokenizer),
        pad_token_id=pad_id(tokenizer),
        batch_size=config.trainer.eval_batch_size,
        tokenizer=tokenizer,
    )
    texts, truncated = rollout.responses or (), rollout.truncated.tolist()
    samples = [
        {"row_id": row.id, "prompt": [list(turn) for turn in row.prompt], "response": text, "truncated": cut}
        for row, text, cut in zip(rows, texts, truncated, strict=True)
    ]
    if config.data.source != "toyworld":
        return samples, {}
    metrics = evaluate_policy_against_truth(
        [row.prompt for row in rows],
        texts,
        truncated=truncated,
        draws=config.evaluation.bootstrap_draws,
        confidence=config.evaluation.confidence,
        seed=config.seed,
    )
    return samples, metrics
