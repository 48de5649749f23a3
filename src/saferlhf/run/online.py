"""Online runs: prompts instead of rows with responses, and the plan of a run whose roles share the memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saferlhf.config.schema import TrainConfig
from saferlhf.data.build import Splits, build_data
from saferlhf.data.encode import Encoder
from saferlhf.data.rows import PromptRow, QuestionAnswer
from saferlhf.errors import UserError
from saferlhf.models.roles_build import planned_starts
from saferlhf.rollout.prompts import tokenize_prompts
from saferlhf.tasks.actor_critic import ActorCriticTask
from saferlhf.tasks.online_prompts import EncodedPrompts


def encode_prompts(config: TrainConfig, encoder: Encoder, rows: list[PromptRow], tokenizer: Any) -> EncodedPrompts:
    """Prompts of a split; over-long ones lose their beginning."""
    assert config.rollout is not None
    room = config.rollout.max_prompt_tokens or config.backbone.max_length - config.rollout.new_tokens
    return EncodedPrompts(rows, tokenize_prompts(rows, encoder.template, tokenizer, max_prompt_tokens=room))


def supervised_rows(config: TrainConfig, encoder: Encoder) -> Any:
    """Demonstrations of the same data for the ptx loss; None where it has no weight.

    Raises:
        UserError: the data have no responses.
    """
    if not config.task.ptx_coefficient:
        return None
    try:
        # as for SFT: demonstrations out of pairs must not teach unsafe responses
        answers = config.data.answers or (None if config.data.source == "toyworld" else "best")
        rows: Splits[QuestionAnswer] = build_data(replace(config.data, answers=answers), QuestionAnswer)
    except UserError as error:
        mend = "task.ptx_coefficient=0, or data with responses"
        raise UserError(f"the ptx loss needs responses: {error.what}", "task.ptx_coefficient", mend) from None
    return encoder.answers(rows.train, "train", rows.report, config.data.policy)


def online_plan_rows(config: TrainConfig, task: ActorCriticTask | None, steps: int) -> list[tuple[str, str]]:
    """Lines of the plan about roles and rollouts; without a task, whose models are not there yet, of rollouts alone."""
    rollout, ppo = config.rollout, config.task
    assert rollout is not None
    responses = rollout.prompts * rollout.samples
    micro = config.trainer.micro_batch_size
    lines = [
        ("rollouts", f"{steps:,} of {rollout.prompts} prompts x {rollout.samples}, {rollout.new_tokens} new tokens")
    ]
    lines.append(("", f"each {ppo.epochs} passes of {ppo.mini_batches} steps" + (f" in {micro}s" if micro else "")))
    lines.append(("", f"{responses * steps:,} responses in all"))
    if task is not None and task.roles is not None:
        lines += [(row["role"], "trained, " * row["trained"] + row["start"]) for row in task.roles.describe()]
    elif task is not None:
        lines += planned_starts(task.role_plan())
    given = [f"{name} by {signal.judge.name}" for name, signal in (config.scorers or {}).items()]
    if given:
        lines.append(("scorers", ", ".join(given)))
    lines.append(("constraint", f"{config.constraint.name}, advantages by {config.advantage.name}"))
    lines.append(("learning rate", f"actor {config.optimizer.lr:g}, {config.schedule.name}; critics {ppo.critic.lr:g}"))
    return lines
