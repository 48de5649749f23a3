"""Fitting a probe: which layers, which penalties, and heads that read raw hidden states.

Everything is chosen on the training rows, by the loss of rows that a fit has not seen (K folds, no prompt in two):

1. Each layer by itself, by ridge regression on the labels (`ops/ridge.py`): a second where the exact fit takes a
   minute, and the same ranking.
2. An order of layers: begin with the best one; then always add the layer whose predictions, averaged with those chosen
   so far, lower the error most (Caruana et al. 2004, "Ensemble selection from libraries of models").
3. Growing sets along that order, by ridge regression too: side by side (`concatenate`) or averaged (`average`), until a
   larger set gains less than `LEAST_GAIN`. With `kernel.name: gaussian` by ridge regression through the kernel
   (`ops/kernel_ridge.py`) instead, and of the sets within `LEAST_GAIN` of the best the largest: a kernel of more layers
   costs no more to fit, and what one layer says by chance another does not.
4. The set that is left, cross-validated exactly: each head gets its own penalty. Its loss is told relative to that of
   the base rates and averaged over the heads by their weights: 1 = nothing learned.

With a kernel the chosen layers are cross-validated once more through it (`ops/kernel.py`), with penalties of its own
scale; that fit is taken if its loss is less. The linear one is kept beside it, for comparison on held-out rows.

The heads are then fitted on all training rows and folded with the standardisation into plain linear maps. The
out-of-fold outputs of the winner are what temperatures and thresholds are fitted on: as many rows as there are for
training, and none of them seen by the heads that judged it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferlhf.config.task_schema import ProbeConfig
from saferlhf.evaluation.features import RowFeatures
from saferlhf.ops.kernel import KernelBasis
from saferlhf.ops.kernel_ridge import kernel_ridge_out_of_fold, mean_squared_differences
from saferlhf.ops.linear_probe import (
    Basis,
    CrossValidation,
    HeadWeights,
    Targets,
    apply_heads,
    cross_validate,
    fit_heads,
    head_losses,
    moments,
    standardised,
)
from saferlhf.ops.ridge import order_by_average, relative_errors, ridge_out_of_fold, ridge_targets

SET_SIZES = (1, 2, 3, 4)
KERNEL_SET_SIZES = (1, 2, 4, 8, 12)
"""Numbers of layers that are tried together, by linear heads and through a kernel."""

LEAST_GAIN = 0.002
"""Relative squared error that counts as a difference between sets; less is noise."""

Errors = dict[tuple[int, ...], dict[str, float]]
"""Layers -> head name -> relative squared error."""

FLOOR = 1e-2
"""Axes whose energy is below this share of the least penalty are dropped: there the penalty rules."""


@dataclass(frozen=True)
class Tried:
    """One set of layers in cross-validation.

    Attributes:
        layers: numbers of hidden states.
        loss: head name -> mean out-of-fold loss of a row.
        relative: the losses relative to those of the base rates, averaged over heads by their weights.
        l2: head name -> penalty; of an average of layers, the first layer's.
        kernel: whether the heads are linear in a kernel of the states, not in the states.
        scores: head name -> (N, n) out-of-fold outputs.
        seconds: that it took.
    """

    layers: tuple[int, ...]
    loss: dict[str, float]
    relative: float
    l2: dict[str, float]
    scores: dict[str, Tensor]
    seconds: float
    kernel: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the outputs."""
        return {
            "layers": list(self.layers),
            "kernel": self.kernel,
            "relative_loss": self.relative,
            "loss": self.loss,
            "l2": self.l2,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class LinearFit:
    """Linear heads to compare others with.

    Attributes:
        heads: on pooled hidden states as they are.
        scores: head name -> (N, n) out-of-fold outputs of the training rows.
    """

    heads: HeadWeights
    scores: dict[str, Tensor]


@dataclass(frozen=True)
class ProbeFit:
    """A fitted probe.

    Attributes:
        layers: that the heads read.
        heads: head name -> weight (n, F) and bias (n,), on pooled hidden states as they are; with a kernel (n, M), on
            its values.
        scores: head name -> (N, n) out-of-fold outputs of the training rows.
        chosen: the set of layers that won.
        tried: all of them, in order.
        rough: layers -> head name -> relative squared error of ridge regression, where layers were chosen.
        rough_kernel: the same through the kernel.
        kernel: stands between states and heads; None: nothing does.
        linear: with a kernel, the linear heads on the same layers; None: `heads` are linear themselves.
    """

    layers: tuple[int, ...]
    heads: HeadWeights
    scores: dict[str, Tensor]
    chosen: Tried
    tried: tuple[Tried, ...]
    rough: Errors
    rough_kernel: Errors
    kernel: KernelBasis | None = None
    linear: LinearFit | None = None


def fit_probe(
    features: RowFeatures,
    targets: Targets,
    sizes: Mapping[str, int],
    task: ProbeConfig,
    folds: NDArray[np.int64],
    say: Callable[[str], None] = lambda _: None,
) -> ProbeFit:
    """Choose layers and penalties, then fit on all rows.

    Args:
        features: of N training rows; all their layers may be chosen where `task.layers` is "auto".
        targets: labels of the rows.
        sizes: head name -> outputs.
        task: span, layers, combine, l2.
        folds: (N,) fold of each row, as of `ops/folds.py`.
        say: told of each set of layers.
    """
    search = _Search(features, targets, sizes, task, folds, say)
    layers = search.grow() if task.layers == "auto" else features.layers
    linear = search.together(layers)
    plain = search.final(linear)
    if task.kernel.name == "gaussian":
        through, basis, z = search.through_kernel(layers)
        if through.relative < linear.relative:
            heads, beside = search.on_kernel(basis, z, through), LinearFit(plain, linear.scores)
            return ProbeFit(layers, heads, through.scores, through, *search.record(), basis, beside)
    return ProbeFit(layers, plain, linear.scores, linear, *search.record())


class _Search:
    """Cross-validation of sets of layers; what was tried is kept."""

    def __init__(
        self,
        features: RowFeatures,
        targets: Targets,
        sizes: Mapping[str, int],
        task: ProbeConfig,
        folds: NDArray[np.int64],
        say: Callable[[str], None],
    ) -> None:
        self.features, self.targets, self.sizes, self.task, self.folds, self.say = (
            features,
            targets,
            dict(sizes),
            task,
            folds,
            say,
        )
        self.weights: dict[str, float] = {name: getattr(targets.weights, name) for name in self.sizes}
        self.tried: list[Tried] = []
        self.singles: dict[int, Tried] = {}
        self.rough: Errors = {}
        self.rough_kernel: Errors = {}
        self.penalties = [float(l2) for l2 in task.l2]
        self._last: tuple[tuple[int, ...], Basis, Tensor] | None = None
        zero = {name: _base_rates(name, size, targets) for name, size in self.sizes.items()}
        self.base = head_losses(zero, targets)

    def record(self) -> tuple[tuple[Tried, ...], Errors, Errors]:
        """What was tried: exactly, by ridge regression, by ridge regression through the kernel."""
        return tuple(self.tried), self.rough, self.rough_kernel

    # -------------------------------------------------------------------------------------------- sets of layers
    def grow(self) -> tuple[int, ...]:
        """The set that growing ends with."""
        through_kernel = self.task.kernel.name == "gaussian"
        y = ridge_targets(self.targets, list(self.sizes))
        singles = {layer: self._ridge((layer,), y) for layer in self.features.layers}
        order = order_by_average(singles, y, self.weights, (KERNEL_SET_SIZES if through_kernel else SET_SIZES)[-1])
        self.say(f"  layers by ridge regression: {', '.join(map(str, order))}")
        if through_kernel:
            return self._grown_through_kernel(order)
        best = order[:1]
        for size in [size for size in SET_SIZES[1:] if size <= len(order)]:
            larger = tuple(order[:size])
            if self.task.combine == "concatenate":
                self._ridge(larger, y)
            else:
                self.rough[larger] = relative_errors(_mean([singles[n] for n in larger]), y)
            if self._rough_error(best) - self._rough_error(larger) < LEAST_GAIN:
                break
            best = list(larger)
        return tuple(best)

    def _grown_through_kernel(self, order: Sequence[int]) -> tuple[int, ...]:
        """The largest beginning of the order whose error through the kernel is as good as the best one's."""
        kernel, n = self.task.kernel, len(self.targets)
        # distances of all pairs of rows: some thousand rows tell as much
        rows = np.sort(np.random.default_rng(0).permutation(n)[: kernel.landmarks])
        y = ridge_targets(self.targets.rows(torch.from_numpy(rows)), list(self.sizes))
        distances = [mean_squared_differences(self.features.matrix((layer,), self.task.span)[rows]) for layer in order]
        penalties = [float(l2) for l2 in kernel.l2]
        found: dict[tuple[int, ...], float] = {}
        for size in [size for size in KERNEL_SET_SIZES if size <= len(order)]:
            layers = tuple(order[:size])
            errors = relative_errors(
                kernel_ridge_out_of_fold(distances[:size], kernel.gamma, y, self.folds[rows], penalties), y
            )
            self.rough_kernel[layers] = errors
            found[layers] = self._weighted(errors)
        chosen = [layers for layers in found if found[layers] <= min(found.values()) + LEAST_GAIN][-1]
        self.say(f"  through a kernel: the first {len(chosen)} of them")
        return chosen

    def _ridge(self, layers: tuple[int, ...], y: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Out-of-fold predictions by ridge regression; their errors are noted."""
        x = self.features.matrix(layers, self.task.span)
        predicted = ridge_out_of_fold(standardised(x, *moments(x)), y, self.folds, self.penalties)
        self.rough[layers] = relative_errors(predicted, y)
        return predicted

    def _rough_error(self, layers: Sequence[int]) -> float:
        return self._weighted(self.rough[tuple(layers)])

    def together(self, layers: Sequence[int]) -> Tried:
        """A set of layers, combined as the task says."""
        if self.task.combine == "concatenate" or len(layers) == 1:
            return self._cross_validated(tuple(layers))
        started = time.monotonic()
        singles = [self.single(layer) for layer in layers]
        return self._tried(tuple(layers), _mean([one.scores for one in singles]), singles[0].l2, started)

    def single(self, layer: int) -> Tried:
        """One layer by itself."""
        if layer not in self.singles:
            self.singles[layer] = self._cross_validated((layer,))
        return self.singles[layer]

    def _cross_validated(self, layers: tuple[int, ...]) -> Tried:
        started = time.monotonic()
        basis, z = self._rows(layers)
        found: CrossValidation = cross_validate(z, basis.energy, self.targets, self.sizes, self.folds, self.penalties)
        return self._tried(layers, found.scores, found.l2, started)

    # -------------------------------------------------------------------------------------------- kernel
    def through_kernel(self, layers: tuple[int, ...]) -> tuple[Tried, KernelBasis, Tensor]:
        """A kernel of the chosen layers, cross-validated with its own penalties; and the rows in its coordinates."""
        started, kernel = time.monotonic(), self.task.kernel
        x = self.features.matrix(layers, self.task.span)
        basis = KernelBasis.of(x, gamma=kernel.gamma, axes=kernel.axes, rank=kernel.rank, most=kernel.landmarks)
        z, penalties = basis.project(x), [float(l2) for l2 in kernel.l2]
        found = cross_validate(z, basis.energy, self.targets, self.sizes, self.folds, penalties)
        return self._tried(layers, found.scores, found.l2, started, kernel=True), basis, z

    def on_kernel(self, basis: KernelBasis, z: Tensor, chosen: Tried) -> HeadWeights:
        """Heads on kernel values, fitted on all rows."""
        return basis.unfold(fit_heads(z, basis.energy, self.targets, self.sizes, chosen.l2))

    def _tried(
        self,
        layers: tuple[int, ...],
        scores: dict[str, Tensor],
        l2: dict[str, float],
        started: float,
        kernel: bool = False,
    ) -> Tried:
        loss = head_losses(scores, self.targets)
        tried = Tried(layers, loss, self.relative(loss), l2, scores, time.monotonic() - started, kernel)
        self.tried.append(tried)
        self.say(_line(tried))
        return tried

    def relative(self, loss: Mapping[str, float]) -> float:
        """Losses relative to the base rates', averaged over heads by their weights."""
        return self._weighted({name: loss[name] / max(self.base[name], 1e-12) for name in loss})

    def _weighted(self, values: Mapping[str, float]) -> float:
        """Mean over the heads by their weights."""
        return float(sum(self.weights[name] * values[name] for name in values) / sum(self.weights.values()))

    # -------------------------------------------------------------------------------------------- final heads
    def final(self, chosen: Tried) -> HeadWeights:
        """Heads on raw features, fitted on all rows."""
        if self.task.combine == "concatenate" or len(chosen.layers) == 1:
            return self._fitted(chosen.layers, chosen.l2)
        fits = [self._fitted((layer,), self.single(layer).l2) for layer in chosen.layers]
        share = 1.0 / len(fits)
        return {
            name: (
                share * np.concatenate([fit[name][0] for fit in fits], axis=1),
                share * np.sum([fit[name][1] for fit in fits], axis=0),
            )
            for name in self.sizes
        }

    def _fitted(self, layers: tuple[int, ...], l2: Mapping[str, float]) -> HeadWeights:
        basis, z = self._rows(layers)
        return basis.unfold(fit_heads(z, basis.energy, self.targets, self.sizes, l2))

    def _rows(self, layers: tuple[int, ...]) -> tuple[Basis, Tensor]:
        """Rows along the principal axes; those of the last set are kept, since axes take as long as fits."""
        if self._last is not None and self._last[0] == layers:
            return self._last[1:]
        x = self.features.matrix(layers, self.task.span)
        basis = Basis.of(x, floor=FLOOR * min(self.penalties))
        self._last = (layers, basis, basis.project(x))
        return self._last[1:]


def _mean(outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in outputs]).mean(dim=0) for name in outputs[0]}


def _base_rates(name: str, size: int, targets: Targets) -> Tensor:
    """(N, n) the constant outputs with the least loss."""
    nothing = torch.zeros(len(targets), 1)
    return apply_heads(fit_heads(nothing, np.ones(1), targets, {name: size}, {name: 1.0}), nothing)[name]


def _line(tried: Tried) -> str:
    layers = ", ".join(map(str, tried.layers))
    through = " through a kernel" if tried.kernel else ""
    return f"  layers {layers}{through}: relative loss {tried.relative:.4f}"
