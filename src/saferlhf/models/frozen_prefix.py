"""What lies below the first trained block, computed once per row: a fine-tuning step then costs its upper blocks only.

With adapters on blocks k, k+1, ... alone, the state h_k of every token that enters block k never changes during
training. It is computed when a row is seen for the first time, kept on disk (`models/state_store.py`) and read from
there in later epochs and by later runs with other seeds, heads or tasks on the same rows. The rest of the model goes on
from it: the blocks are called by the model itself, which is handed h_k in the place of embeddings and a list of blocks
that begins with k.

Rows are computed one by one, without padding, so what is kept does not depend on which rows shared a batch. Whether a
backbone can be cut there is checked on a few tokens before anything is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.causal import unwrapped
from saferlhf.models.layers import blocks_of, visit_states
from saferlhf.models.modes import eval_mode
from saferlhf.models.state_store import StateStore

LARGEST_DIFFERENCE = {False: 1e-4, True: 0.03}
"""Relative difference of last states, whole and cut, that is rounding: in float32, in lower precision."""

CHECKED_TOKENS = 12

Call = Callable[..., Tensor]
"""From keyword inputs of the trunk to its last hidden states."""


class FrozenPrefix:
    """The frozen blocks of a trunk below its first trained one.

    Args:
        trunk: with adapters; none of them below block `first`.
        first: k, the number of the first block that is trained; 1 or more.
        identity: of the backbone's weights, for the store.
        cache_dir: the project's cache folder.

    Raises:
        UserError: something below block `first` is trained.
    """

    def __init__(self, trunk: nn.Module, first: int, identity: str, cache_dir: str | Path | None = None) -> None:
        self.trunk, self.first, self.cache_dir = trunk, first, cache_dir
        self.identity = identity
        self.width = int(unwrapped(trunk).config.get_text_config().hidden_size)
        self.blocks = blocks_of(trunk)
        self._owner, self._name = _owner_of(unwrapped(trunk), self.blocks)
        self._stores: dict[str, StateStore] = {}
        below = {parameter for block in self.blocks[:first] for parameter in block.parameters()}
        if not 1 <= first < len(self.blocks) or any(parameter.requires_grad for parameter in below):
            what = f"there is nothing frozen below block {first} of {len(self.blocks)}"
            raise UserError(
                what, "adapter.cache_frozen", "name the upper blocks, as adapter.blocks=[16,17,18,19,20,21]"
            )

    def continued(self, call: Call, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states (S, T, H): `call` from the states that enter block k on.

        Args:
            call: runs the trunk.
            input_ids, attention_mask: (S, T), as `call` would get them; rows are padded on the right.
            inputs: what else it gets.
        """
        states = self.states(input_ids, attention_mask)
        with self._skipped():
            return call(inputs_embeds=states, attention_mask=attention_mask, **inputs)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(S, T, H) float32 that enter block k; zeros at padding."""
        device, mask = input_ids.device, attention_mask.bool().cpu().numpy()
        rows = [ids[seen] for ids, seen in zip(input_ids.cpu().numpy(), mask, strict=True)]
        half = torch.is_autocast_enabled(device.type) or next(self.trunk.parameters()).dtype != torch.float32
        store = self._store(half)
        keys = [hashlib.blake2b(row.astype(np.int32).tobytes(), digest_size=16).digest() for row in rows]
        known: dict[bytes, NDArray[Any]] = {
            key: found for key, found in zip(keys, store.get(keys), strict=True) if found is not None
        }
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        if missing:
            fresh = {key: self._computed(row, device).astype(store.dtype) for key, row in missing.items()}
            store.put(fresh)
            known |= fresh
        joined = np.zeros((*mask.shape, store.width), dtype=store.dtype)
        for index, key in enumerate(keys):
            joined[index, mask[index]] = known[key]
        return torch.from_numpy(joined).to(device).float()

    def check(self, hidden: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Compare the cut model with the whole one on two short rows, one of them padded.

        Args:
            hidden: from (S, T) ids and mask to last hidden states by way of `continued`.

        Raises:
            UserError: they differ: this backbone does more with its embeddings than hand them to its first block.
        """
        device = next(self.trunk.parameters()).device
        ids = torch.arange(1, 2 * CHECKED_TOKENS + 1, device=device).view(2, -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, CHECKED_TOKENS // 2 :] = False
        with eval_mode(self.trunk), torch.no_grad():
            cut = hidden(ids, mask)[mask].float()
            whole = [self._run(ids[row, mask[row]][None])[0].float() for row in (0, 1)]
        difference = float((torch.cat(whole) - cut).norm() / cut.norm().clamp_min(1e-12))
        half = next(self.trunk.parameters()).dtype != torch.float32
        if not difference <= LARGEST_DIFFERENCE[half]:
            what = f"this backbone cannot be cut at block {self.first}: its states would differ by {difference:.1%}"
            raise UserError(what, "adapter.cache_frozen", "adapter.cache_frozen=false")

    def _run(self, ids: Tensor) -> Tensor:
        return unwrapped(self.trunk)(input_ids=ids, use_cache=False).last_hidden_state

    # -------------------------------------------------------------------------------------------- below block k
    def _store(self, half: bool) -> StateStore:
        dtype = "float16" if half else "float32"
        if dtype not in self._stores:
            about = {"model": self.identity, "block": self.first, "half": half}
            self._stores[dtype] = StateStore(about, self.width, dtype, self.cache_dir)
        return self._stores[dtype]

    @torch.no_grad()
    def _computed(self, row: NDArray[Any], device: torch.device) -> NDArray[Any]:
        """(T, H) that enter block k, of one row without padding; a row without tokens has none."""
        if not len(row):
            return np.zeros((0, self.width), np.float32)
        kept: dict[int, Tensor] = {}
        ids = torch.from_numpy(row.astype(np.int64)).to(device)[None]
        with eval_mode(self.trunk):  # dropout below would make what is kept a matter of chance
            visit_states(self.trunk, lambda: self._run(ids), [self.first], kept.__setitem__, self.blocks)
        return kept[self.first][0].float().cpu().numpy()

    @contextmanager
    def _skipped(self) -> Iterator[None]:
        """The model's list of blocks begins with block k."""
        setattr(self._owner, self._name, self.blocks[self.first :])
        try:
            yield
        finally:
            setattr(self._owner, self._name, self.blocks)


def _owner_of(model: nn.Module, blocks: nn.ModuleList) -> tuple[nn.Module, str]:
    """The module that holds the list of blocks, and under which name."""
    for module in model.modules():
        for name, child in module.named_children():
            if child is blocks:
                return module, name
    raise ValueError("the list of blocks belongs to no module of the model")
