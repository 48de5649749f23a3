"""How many bytes of tensors are alive, and how many at most: what a computation takes, counted instead of guessed.

Every operation's result goes by here. A storage counts from the operation that makes it until nobody holds it any
more, neither Python nor the graph that the backward pass runs through; views and in-place results share a storage and
count once. Under PyTorch's `FakeTensorMode` tensors have shapes and no content, so a step of a model of any size is
counted on a laptop in seconds, by the code that would run it: what a block keeps for the backward pass needs no
formula, whatever the architecture. (The idea is that of PyTorch's own `MemTracker`; this one also tells logits and
gradients apart.)

Not seen are buffers inside one operation's kernel, and what an allocator keeps beyond what it was asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Bytes:
    """Bytes by what they are for.

    Attributes:
        gradients: of parameters.
        logits: whatever has the vocabulary as its last axis: logits, their float32 copies, probabilities.
        activations: the rest.
    """

    gradients: int = 0
    logits: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.gradients + self.logits + self.activations

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.gradients + other.gradients, self.logits + other.logits, self.activations + other.activations)

    def __sub__(self, other: Bytes) -> Bytes:
        return self + other * -1

    def __mul__(self, times: int) -> Bytes:
        return Bytes(self.gradients * times, self.logits * times, self.activations * times)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is active.

    Args:
        vocabulary: last axis of logits; 0: nothing is told apart.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self._now = {"gradients": 0, "logits": 0, "activations": 0}
        self._window = ""
        self._highest: dict[str, Bytes] = {"": Bytes()}
        self._kinds: dict[int, tuple[Any, str, int]] = {}  # storage -> weak reference to it, kind, bytes

    @property
    def now(self) -> Bytes:
        """Alive at this moment."""
        return Bytes(**self._now)

    def highest(self, window: str | None = None) -> Bytes:
        """Bytes at the moment of the largest sum, of one window or of all."""
        if window is not None:
            return self._highest.get(window, Bytes())
        return max(self._highest.values(), key=lambda found: found.total)

    def enter(self, window: str) -> None:
        """From now on the largest sum is noted under this name, beside what it was there before."""
        self._window = window
        self._note()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These are known already (weights, inputs): they and their views count nothing."""
        for tensor in tensors:
            self._take(tensor, "activations", 0)

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Tell the gradients of trained parameters from activations as soon as they are there."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._is_gradient)  # type: ignore[no-untyped-call]

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key not in self._kinds:
            self._count(parameter.grad)
        reference, kind, size = self._kinds[key]
        self._kinds[key] = (reference, "gradients", size)
        self._now[kind] -= size
        self._now["gradients"] += size
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return made

    def _count(self, tensor: Tensor) -> None:
        logits = bool(self.vocabulary) and tensor.ndim >= 2 and tensor.shape[-1] == self.vocabulary
        self._take(tensor, "logits" if logits else "activations", None)

    def _take(self, tensor: Tensor, kind: str, size: int | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        size = storage.nbytes() if size is None else size
        # the storage's Python object lives as long as anybody holds the storage, the autograd graph included
        self._kinds[key] = (weakref.ref(storage, lambda _: self._gone(key)), kind, size)
        self._now[kind] += size
        self._note()

    def _note(self) -> None:
        before = self._highest.get(self._window)
        if before is None or sum(self._now.values()) > before.total:
            self._highest[self._window] = self.now

    def _gone(self, key: int) -> None:
        _, kind, size = self._kinds.pop(key)
        self._now[kind] -= size
