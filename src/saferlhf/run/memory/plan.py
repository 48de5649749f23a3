"""Memory of a run by role, by phase and by device, before any weights are loaded.

    peak = largest sum over the phases      rollout, scoring, update, evaluation, save
    sum  = weights + gradients + optimizer + what the phase takes (`trace.py`) + cache + what the device keeps itself

Per device, with n devices:

    single, ddp     weights, gradients and optimizer whole on each; with ddp gradients a second time, in buckets
    fsdp            unpacked weights, gradients and optimizer 1/n (of k copies of the model: k/n); beside them whole
                    those outside the blocks and of two blocks, one at work and one on its way; a 4-bit base whole;
                    for sampling the policy whole (never decode through sharded weights); with cpu_offload the shards
                    lie in the host's memory

Gradients of a step stay until the next step begins, so they are there while responses are sampled and scored. Paged
optimizer states count nothing on the device: they lie in the host's memory.

The published scheme to compare with (Safe RLHF's scripts, DeepSpeed mixed precision): 16 bytes for a trained parameter
(bfloat16 weight and gradient, float32 master weight and two AdamW moments), 2 for a frozen one; six LLaMA-7B are
3 * 6.74e9 * 16 + 3 * 6.74e9 * 2 = 364 GB before activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ProbeConfig
from saferlhf.models.live_bytes import Bytes
from saferlhf.run.memory.roles import RoleShape, critics_of, role_shapes
from saferlhf.run.memory.trace import Pass, Weights, pass_bytes, sampling_bytes
from saferlhf.run.memory.workload import Workload, full_length
from saferlhf.run.trainer import micro_batch_size

GIB = 2**30
CUDA_BYTES = int(0.8 * GIB)
"""Context and workspaces of CUDA, cuBLAS and bitsandbytes; an assumption, not measured here."""

CUDA_KEPT = 0.05
"""Share of what is asked for that the caching allocator keeps in pieces of the wrong size; an assumption."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of a role on one device.

    Attributes:
        name: of the role.
        trained: whether it learns.
        count, trained_count: numbers in its weights, and those that learn.
        weights, gradients, optimizer: bytes.
    """

    name: str
    trained: bool
    count: int
    trained_count: int
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Phase:
    """Bytes of a phase at its highest, on one device.

    Attributes:
        name: rollout | scoring | update | evaluation | save.
        resident: weights and optimizer.
        gradients: of the phase's highest moment.
        activations, logits, cache: likewise.
        other: buckets, gathered weights, and what the device keeps itself.
    """

    name: str
    resident: int
    gradients: int
    activations: int
    logits: int
    cache: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.resident + self.gradients + self.activations + self.logits + self.cache + self.other


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of a run.

    Attributes:
        roles: in the order in which they are loaded.
        phases: in the order in which they happen.
        device: cpu | gpu.
        devices, strategy: how the run is spread.
        host: bytes that lie in the host's memory instead: paged optimizer states, offloaded shards.
        workload: what was planned for.
        published: bytes before activations in the published scheme, for full fine-tuning of separate roles; else None.
    """

    roles: tuple[RoleMemory, ...]
    phases: tuple[Phase, ...]
    device: str
    devices: int
    strategy: str
    host: int
    workload: Workload
    published: int | None = None

    @property
    def highest(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of that phase."""
        return self.highest.total

    def fits(self, gib: float) -> bool:
        """Whether a device of so many GiB is enough."""
        return self.peak <= gib * GIB


def plan_memory(
    config: TrainConfig, workload: Workload | None = None, *, device: str = "gpu", vocabulary_size: int | None = None
) -> MemoryPlan:
    """Plan a checked config, defaults filled in.

    Args:
        config: of the run.
        workload: lengths of its rows; None: as long as the backbone takes them.
        device: cpu or gpu: what keeps memory of its own beside the tensors.
        vocabulary_size: of the tokenizer, where the architecture leaves it open.

    Raises:
        UserError: a backbone whose configuration cannot be read.
    """
    return _Planner(config, workload or full_length(config), device, vocabulary_size).plan()


def published_bytes(trained: int, frozen: int) -> int:
    """Bytes before activations in the published scheme.

    Args:
        trained, frozen: numbers of parameters.
    """
    return 16 * trained + 2 * frozen


class _Planner:
    """Puts roles and phases together."""

    def __init__(self, config: TrainConfig, workload: Workload, device: str, vocabulary_size: int | None) -> None:
        self.config, self.workload, self.device = config, workload, device
        if config.strategy.activation_checkpointing:
            config = replace(config, backbone=replace(config.backbone, gradient_checkpointing=True))
        self.shapes = role_shapes(config, vocabulary_size)
        self.devices = max(1, config.trainer.devices)
        strategy = config.strategy
        # Lightning's choice for several devices is ddp
        self.strategy = "ddp" if strategy.name == "single" and self.devices > 1 else strategy.name
        self.shards = max(1, self.devices // strategy.replicas) if strategy.sharded else 1
        self.offloaded = strategy.sharded and strategy.cpu_offload
        self.roles = tuple(self._role(role) for role in self.shapes)
        paged = config.optimizer.name == "paged_adamw_8bit"
        self.host = sum(self._states(role.weights) for role in self.shapes if role.trained) if paged else 0
        if self.offloaded:
            sizes = [(r.weights, self._states(r.weights) if r.trained else 0) for r in self.shapes]
            self.host = sum(self._share(self._spread(w) + w.trained + states) for w, states in sizes)

    def plan(self) -> MemoryPlan:
        """All of it."""
        online = isinstance(self.config.task, PpoConfig)
        phases = self._online() if online else self._supervised()
        published = None
        roles = self.config.roles
        if online and roles is not None and roles.name == "separate" and self.config.adapter.name == "none":
            # the scheme counts a whole model for each role
            trained = sum(role.trained for role in self.roles)
            published = published_bytes(
                self.roles[0].count * trained, self.roles[0].count * (len(self.roles) - trained)
            )
        return MemoryPlan(
            self.roles, tuple(phases), self.device, self.devices, self.strategy, self.host, self.workload, published
        )

    # -------------------------------------------------------------------------------------------- what stays
    def _states(self, weights: Weights) -> int:
        known = {"adamw": weights.adamw, "sgd": 0}
        return known.get(self.config.optimizer.name, weights.adamw_8bit)

    def _role(self, role: RoleShape) -> RoleMemory:
        own = role.weights
        spread = self._spread(own)
        states = self._states(own) if role.trained and self.config.optimizer.name != "paged_adamw_8bit" else 0
        return RoleMemory(
            role.name,
            role.trained,
            own.trained_count + own.frozen_count,
            own.trained_count if role.trained else 0,
            own.trained + own.frozen - spread + (0 if self.offloaded else self._share(spread)),
            self._share(own.trained) if role.trained and not self.offloaded else 0,
            0 if self.offloaded else self._share(states),
        )

    def _spread(self, weights: Weights) -> int:
        """Bytes of what is sharded, where anything is."""
        kept = 0 if self.config.strategy.shard_packed else weights.packed
        return weights.trained + weights.frozen - kept

    def _share(self, size: int) -> int:
        return math.ceil(size / self.shards)

    @property
    def _resident(self) -> int:
        return sum(role.weights + role.optimizer for role in self.roles)

    @property
    def _gradients(self) -> int:
        return sum(role.gradients for role in self.roles)

    def _phase(self, name: str, gradients: int, found: Bytes, *, cache: int = 0, other: int = 0) -> Phase:
        """A phase in which `found` comes on top of what stays."""
        if self.strategy == "ddp":
            other += self._gradients
        gradients += self._share(found.gradients)
        asked = self._resident + gradients + found.activations + found.logits + cache + other
        # a CPU keeps nothing, where its allocator gives freed memory back (docs/oom.md)
        other += CUDA_BYTES + int(CUDA_KEPT * asked) if self.device == "gpu" else 0
        return Phase(name, self._resident, gradients, found.activations, found.logits, cache, other)

    @property
    def _gathers_halves(self) -> bool:
        """Whether weights are gathered in numbers half as wide as those of their shards."""
        return self.config.strategy.gather_bf16 and self.config.backbone.dtype == "float32"

    def _gathered(self, role: RoleShape, backward: bool) -> int:
        """Weights that are whole beside their shard while a model works, and their gradients before they are dealt."""
        if self.shards == 1:
            return 0
        model = next((r.weights for r in self.shapes if r.name == "base"), role.weights)
        whole = model.outside + 2 * model.block
        strategy = self.config.strategy
        if not strategy.reshard_after_forward:
            whole = self._spread(model)
        if self._gathers_halves:
            whole //= 2
        return whole * (2 if backward and role.weights.trained > model.frozen else 1)

    # -------------------------------------------------------------------------------------------- supervised
    def _supervised(self) -> list[Phase]:
        config, work = self.config, self.workload
        role = self.shapes[0]
        pairs = 2 if config.task.name in ("reward", "cost") else 1
        if isinstance(config.task, ProbeConfig):
            rows = max(1, config.task.batch_tokens // work.longest)
            found = pass_bytes(role.shape, Pass("states", rows, work.longest, gradients=False))
            return [self._phase("features", 0, found), self._save(0)]
        share = max(1, config.trainer.batch_size // self.devices)
        micro = micro_batch_size(config)
        kind = "nll" if config.task.name == "sft" else "score"
        scored = 0
        if kind == "nll":
            scored = work.longest - 1 if config.task.train_on_prompt else min(work.response, work.longest - 1)
        train = Pass(kind, pairs * micro, work.longest, scored, min(2, math.ceil(share / micro)))
        shown = Pass(kind, pairs * config.trainer.eval_batch_size, work.longest, scored, gradients=False)
        return [
            self._phase("update", 0, pass_bytes(role.shape, train), other=self._gathered(role, True)),
            self._phase(
                "evaluation", self._gradients, pass_bytes(role.shape, shown), other=self._gathered(role, False)
            ),
            self._save(self._gradients),
        ]

    # -------------------------------------------------------------------------------------------- online
    def _online(self) -> list[Phase]:
        roles = {role.name: role for role in self.shapes}
        rollout = self.config.rollout
        assert rollout is not None
        responses = math.ceil(rollout.prompts * rollout.samples / self.devices)
        return [
            self._rollout(roles["actor"], responses),
            self._scoring(roles, responses),
            self._update(roles, responses),
            self._save(self._gradients),
        ]

    def _rollout(self, actor: RoleShape, responses: int) -> Phase:
        rollout, work = self.config.rollout, self.workload
        assert rollout is not None
        rows = rollout.batch_size or (64 if rollout.batch_tokens is None else responses)
        if rollout.batch_tokens is not None:
            rows = min(rows, max(1, rollout.batch_tokens // work.longest))
        rows = min(rows, responses)
        prompts = math.ceil(rows / rollout.samples)
        found = sampling_bytes(actor.shape, rows, prompts, work.prompt)
        cache = found.cache * rows * work.longest
        # a token is added to one layer's keys, then to its values, by a copy
        drawing = found.drawing + Bytes(activations=cache // (2 * actor.shape.blocks))
        reading = found.prompt
        if reading.total > cache + drawing.total:  # which holds the prompt's part of the cache
            cache, moment = 0, reading
        else:
            moment = drawing
        whole = 0
        if self.shards > 1:
            model = next((r.weights for r in self.shapes if r.name == "base"), actor.weights)
            spread = self._spread(model)
            whole = spread // 2 if self._gathers_halves else spread - self._share(spread)
        return self._phase("rollout", self._gradients, moment, cache=cache, other=whole)

    def _scoring(self, roles: dict[str, RoleShape], responses: int) -> Phase:
        trainer, work = self.config.trainer, self.workload
        few = min(trainer.eval_batch_size, trainer.micro_batch_size or trainer.eval_batch_size, responses)
        many = min(trainer.eval_batch_size, responses)
        asked: list[tuple[RoleShape, Pass]] = []
        for name, role in roles.items():
            if name in ("actor", "reference"):
                work_ = Pass("policy", few, work.longest, work.response, gradients=False, tempered=self._tempered)
            elif name == "base":
                continue
            elif role.trained:
                work_ = Pass("value", few, work.longest, gradients=False)
            else:
                work_ = Pass("score", many, work.longest, gradients=False)
            asked.append((role, work_))
        found = [(pass_bytes(role.shape, one), self._gathered(role, False)) for role, one in asked]
        most, gathered = max(found, key=lambda pair: pair[0].total + pair[1])
        return self._phase("scoring", self._gradients, most, other=gathered)

    @property
    def _tempered(self) -> bool:
        assert self.config.rollout is not None
        return self.config.rollout.temperature != 1.0

    def _update(self, roles: dict[str, RoleShape], responses: int) -> Phase:
        """One optimizer step: the actor's passes, then each critic's, beside the gradients of those before."""
        config, ppo, work = self.config, self.config.task, self.workload
        rows = math.ceil(responses / ppo.mini_batches)
        micro = min(config.trainer.micro_batch_size or rows, rows)
        batches = min(2, math.ceil(rows / micro))
        actor, entropy = roles["actor"], ppo.entropy_coefficient > 0
        policy = Pass("policy", micro, work.longest, work.response, batches, True, self._tempered, entropy)
        passes = [(actor, policy)]
        if ppo.ptx_coefficient:
            longest = config.backbone.max_length
            again = min(config.trainer.micro_batch_size or rows, ppo.ptx_batch_size or rows)
            passes.append((actor, Pass("policy", again, longest, longest - 1, 2)))
        value = Pass("value", micro, work.longest, 0, batches)
        passes += [(roles[f"{name}_critic"], value) for name in critics_of(config)]
        held, best = {role.name: 0 for role, _ in passes}, None
        for role, one in passes:
            before = sum(size for name, size in held.items() if name != role.name)
            phase = self._phase("update", before, pass_bytes(role.shape, one), other=self._gathered(role, True))
            best = phase if best is None or phase.total > best.total else best
            held[role.name] = next(r.gradients for r in self.roles if r.name == role.name)
        assert best is not None
        return best

    # -------------------------------------------------------------------------------------------- saving
    def _save(self, gradients: int) -> Phase:
        """What a checkpoint, then the export, takes where the weights are.

        A device hands tensors over one by one. On a CPU, safetensors holds the whole file in memory before it writes,
        and merging makes a plain model beside the adapted one; the optimizer is gone by then.
        """
        model = next((role for role in self.shapes if role.name in ("base", "model", "actor")), self.shapes[0])
        weights = model.weights
        plain = weights.trained + weights.frozen - weights.packed
        config, other = self.config, 0
        if self.device == "cpu":
            merged = config.adapter.name == "lora" and config.adapter.merge_on_export
            file = plain if config.adapter.name == "none" or merged else weights.trained
            states = sum(role.optimizer for role in self.roles)
            other = max(0, file + (plain if merged else 0) - states)
        elif self.shards > 1:
            other = max(weights.block, weights.outside)  # gathered tensor by tensor
        return self._phase("save", gradients, Bytes(), other=other)
