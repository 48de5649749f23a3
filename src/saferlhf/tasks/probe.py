"""Probe: a moderator's heads on a backbone that stays as it is.

Hidden states are computed once per row, the heads are fitted exactly (`tasks/probe_fit.py`), and what comes out is an
ordinary moderator: a `ScoreModel` that reads the chosen layers, exported without weights of the backbone, of which none
changed. docs/probe.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from saferlhf.errors import UserError
from saferlhf.models.heads import ScoreHead, install_heads
from saferlhf.models.kernel_map import KernelMap
from saferlhf.models.layers import check_layers, layer_count
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.linear_probe import HeadWeights
from saferlhf.tasks.moderator import ModeratorTask
from saferlhf.tasks.probe_fit import ProbeFit


class ProbeTask(ModeratorTask):
    """Says unsafe or safe, which harm categories, and how severe, from hidden states of a frozen backbone."""

    fit_result: ProbeFit | None = None

    def build_model(self, trunk: nn.Module) -> nn.Module:
        """The frozen backbone; its heads come with `install`."""
        check_candidates(self.config.task.layers, trunk)
        return ScoreModel(trunk.requires_grad_(False), {}, pooling=self.config.task.pooling)

    def candidates(self) -> tuple[int, ...]:
        """Layers whose states are computed: those that are named, or all."""
        return check_candidates(self.config.task.layers, self.score_model.trunk)

    @property
    def score_model(self) -> ScoreModel:
        """The backbone with what heads it has."""
        return cast(ScoreModel, self.model)

    def install(self, fit: ProbeFit) -> None:
        """Give the model its heads."""
        task = self.config.task
        self.fit_result = fit
        heads = score_heads(fit.heads)
        kernel = None if fit.kernel is None else KernelMap.of(fit.kernel)
        model = ScoreModel(
            self.score_model.trunk, heads, pooling=task.pooling, layers=fit.layers, span=task.span, kernel=kernel
        )
        self.model = model.requires_grad_(False).eval()


def check_candidates(layers: str | Sequence[int], trunk: nn.Module) -> tuple[int, ...]:
    """The layers that `task.layers` means for a backbone.

    Raises:
        UserError: a word or a number that is no layer.
    """
    count = layer_count(trunk)
    if isinstance(layers, str):
        if layers not in ("auto", "all"):
            raise UserError(f"{layers!r} names no layers", "task.layers", "auto | all | a list as [12,18,24,30]")
        return tuple(range(count + 1))
    return check_layers(layers, count, "task.layers")


def score_heads(heads: HeadWeights) -> nn.ModuleDict:
    """Fitted heads as modules of a `ScoreModel`."""
    built = nn.ModuleDict()
    for name, (weight, _) in heads.items():
        built[name] = ScoreHead(weight.shape[1], weight.shape[0], dtype=torch.float32)
    install_heads(built, heads)
    return built
