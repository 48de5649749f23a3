"""Roles: actor, reference, reward, costs and their critics behind one interface.

A task asks for a role by its name. Whether the role is a model of its own (`roles_separate.py`) or an adapter and a
head on one base that all roles share (`roles_shared.py`) is known here only as "which module, which adapter":

    role         module                      adapter of it
    actor        causal language model       its own, or none: all weights are trained
    reference    causal language model       the SFT adapter, or none, or "off" on the actor's model
    reward, ...  ScoreModel, frozen          its own
    ..._critic   ScoreModel, trained         its own

Switching is one context manager, `using`. It changes which adapter the forward pass goes through and nothing else: a
frozen role neither gains gradients nor drops out, a trained one does not lose them (peft's own switch does both, trap
21 of docs/architecture.md). Where activations are recomputed in the backward pass, that pass runs the forward again and
must find the same adapter: backpropagate inside `using`, or an error says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saferlhf.models.adapters import (
    count_parameters,
    load_trainable_state_dict,
    trainable_state_dict,
    using_adapter,
)
from saferlhf.models.causal import unwrapped
from saferlhf.models.modes import eval_mode
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.value_model import prefix_scores, token_values
from saferlhf.ops.sequences import position_ids

T = TypeVar("T")


@dataclass(frozen=True)
class Role:
    """One role.

    Attributes:
        name: "actor", "reference", "reward", a cost's name, or one of the scores' names + "_critic".
        module: `ScoreModel`, or a causal language model (with or without its peft wrapper).
        trained: whether it learns.
        parameters: what it learns with, when the roles are put together; empty for a frozen role.
        adapters: the peft model whose adapters are switched for it; None: nothing is switched.
        adapter: the adapter to go through; None: none of them.
        head: of a `ScoreModel`.
        scale: scores are multiplied by it.
        start: in words, where its weights came from.
    """

    name: str
    module: Any
    trained: bool = False
    parameters: tuple[nn.Parameter, ...] = ()
    adapters: Any = None
    adapter: str | None = None
    head: str = ""
    scale: float = 1.0
    start: str = ""


class Roles(nn.Module):
    """All roles of online training; a module, so that a trainer moves it and a checkpoint finds its weights.

    Args:
        roles: in order.
        modules: name -> what is registered. Of the roles' modules those that share a base are views and registered
            nowhere else.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    def __init__(self, roles: Sequence[Role], modules: Mapping[str, nn.Module], *, checkpointing: bool = False) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._roles = {role.name: role for role in roles}
        self._checkpointing = checkpointing
        self._active: str | None = None
        # by name, so that a strategy may put other tensors in the parameters' places
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        self._learnt = {role.name: tuple(names[id(p)] for p in role.parameters) for role in roles}
        self._frozen = [m for m in modules.values() if not any(p.requires_grad for p in m.parameters())]
        self.train()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all roles: actor, reference, scores, critics."""
        return tuple(self._roles)

    def __contains__(self, name: object) -> bool:
        return name in self._roles

    def role(self, name: str) -> Role:
        """The role of that name."""
        if name not in self._roles:
            raise KeyError(f"no role {name!r}; there are {', '.join(self._roles)}")
        return self._roles[name]

    def train(self, mode: bool = True) -> Roles:
        """Train mode for what is trained; a frozen module of its own stays in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    # -------------------------------------------------------------------------------------------- switching
    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Everything inside runs as this role; nests, and leaves everything as it was, after an exception too."""
        role = self.role(name)
        if self._active == name:
            yield
            return
        before = self._active
        with ExitStack() as stack:
            if role.adapters is not None:
                stack.enter_context(using_adapter(role.adapters, role.adapter))
            if not role.trained:
                stack.enter_context(eval_mode(_run_by(role)))
            self._active = name
            try:
                yield
            finally:
                self._active = before

    @contextmanager
    def causal(self, name: str) -> Iterator[nn.Module]:
        """The causal language model of the actor or the reference, to decode with: eval mode, and no gradients."""
        role = self._policy(name)
        with self.using(name), eval_mode(_run_by(role)), torch.no_grad():
            yield unwrapped(role.module)

    def with_whole_weights(self, work: Callable[[], T]) -> T:
        """Run work in which the actor decodes; a strategy that shards the weights gathers them for it, once."""
        return work()

    # -------------------------------------------------------------------------------------------- what roles say
    def logits(self, name: str, input_ids: Tensor, attention_mask: Tensor, *, first: int = 0) -> Tensor:
        """Next-token logits of the actor (with gradients) or the reference (without).

        Args:
            name: "actor" or "reference".
            input_ids: (S, T) int64.
            attention_mask: (S, T) bool or int, True = real token, any padding side; positions come from it.
            first: leave out the columns before: those of the shortest prompt, say, which nobody reads.

        Returns:
            (S, T - first, V) in the model's dtype; column t - first is about token t + 1.
        """
        role = self._policy(name)
        model = unwrapped(role.module)
        mask = attention_mask.bool()
        # a fully masked row would make softmax divide zero by zero, and its gradient NaN for the whole batch
        attended = mask.clone()
        attended[:, 0] |= ~mask.any(dim=-1)
        less: dict[str, Any] = {}
        if first and "logits_to_keep" in inspect.signature(model.forward).parameters:
            less["logits_to_keep"] = input_ids.shape[1] - first
        with self._running(role):
            output = model(
                input_ids=input_ids,
                attention_mask=attended.long(),
                position_ids=position_ids(mask),
                use_cache=False,
                **less,
            )
        logits = output.logits if less else output.logits[:, first:]
        return self._guarded(role, logits)

    def scores(self, name: str, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """Scores of whole sequences, without gradients.

        Args:
            name: "reward" or the name of a cost (cost > 0 means unsafe).
            input_ids: (S, T) int64.
            attention_mask: (S, T) bool or int, True = real token.
            response_mask: (S, T) bool or int, True at the response's tokens; read by models that pool them apart.

        Returns:
            (S,) float32.
        """
        role = self.role(name)
        if role.trained or not isinstance(role.module, ScoreModel):
            raise KeyError(f"{name!r} gives no scores")
        with self._running(role):
            found = role.module(input_ids, attention_mask, response_mask)[role.head]  # (S, 1)
        return found.squeeze(-1).float() * role.scale

    def values(self, name: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A critic's value of the state before each token, with gradients.

        Args:
            name: of a critic.
            input_ids: (S, T) int64.
            attention_mask: (S, T) bool or int, True = real token.

        Returns:
            (S, T) float32; column t comes from the tokens before t. 0 at a row's first token and at padding.
        """
        return self.values_and_end(name, input_ids, attention_mask)[0]

    def values_and_end(self, name: str, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`values`, and the (S,) value of the state behind the last token, to bootstrap truncated responses from."""
        role = self.role(name)
        if not role.trained or not isinstance(role.module, ScoreModel):
            raise KeyError(f"{name!r} is no critic")
        with self._running(role):
            scores = prefix_scores(role.module, role.head, input_ids, attention_mask)
        return token_values(self._guarded(role, scores), attention_mask)

    # -------------------------------------------------------------------------------------------- what is trained
    def trainable(self, name: str) -> list[nn.Parameter]:
        """Parameters that the role learns with; no parameter belongs to two roles."""
        parameters = dict(self.named_parameters())
        return [parameters[key] for key in self.trainable_names(name)]

    def trainable_names(self, name: str) -> tuple[str, ...]:
        """Their names in the state dict, in the same order."""
        return self._learnt[self.role(name).name]

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes; frozen bases are found again by their names."""
        return trainable_state_dict(self)

    def load_trained_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put it back; KeyError or ValueError for whatever is missing, surplus or misshapen."""
        load_trainable_state_dict(self, state)

    def actor_for_export(self) -> tuple[nn.Module, str | None]:
        """`model` and `adapter` of `save_export`, which writes the actor as any run of task=sft."""
        role = self.role("actor")
        return role.module, role.adapter

    def describe(self) -> list[dict[str, Any]]:
        """One row per role: name, trained, start, and the number of weights it learns with."""
        return [
            {
                "role": role.name,
                "trained": role.trained,
                "start": role.start,
                "adapter": role.adapter,
                "trained_weights": sum(p.numel() for p in self.trainable(role.name)),
            }
            for role in self._roles.values()
        ]

    def weights(self) -> tuple[int, int]:
        """(trained, frozen) numbers of weights in memory, each counted once."""
        return count_parameters(self)

    # -------------------------------------------------------------------------------------------- helpers
    def _policy(self, name: str) -> Role:
        role = self.role(name)
        if isinstance(role.module, ScoreModel):
            raise KeyError(f"{name!r} is no language model")
        return role

    @contextmanager
    def _running(self, role: Role) -> Iterator[None]:
        gradients: AbstractContextManager[Any] = nullcontext() if role.trained else torch.no_grad()
        with self.using(role.name), gradients:
            yield

    def _guarded(self, role: Role, output: Tensor) -> Tensor:
        """Where the backward pass recomputes, make sure that it happens as this role."""
        if not (self._checkpointing and role.adapters is not None and output.requires_grad):
            return output

        def check(gradient: Tensor) -> None:
            if self._active != role.name:
                raise RuntimeError(
                    f"backward of {role.name!r} while {self._active or 'no role'!r} is in use: with gradient"
                    " checkpointing, call backward inside `with roles.using(...)`"
                )

        output.register_hook(check)
        return output


def _run_by(role: Role) -> Any:
    return role.module.trunk if isinstance(role.module, ScoreModel) else role.module


def as_trained(role: Role, names: Mapping[str, nn.Parameter]) -> Role:
    """The role with everything in `names` as what it learns with; gradients are turned on."""
    for parameter in names.values():
        parameter.requires_grad_(True)
    return replace(role, trained=True, parameters=tuple(names.values()))
