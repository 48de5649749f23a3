"""Hidden states between the blocks of a transformer, numbered as transformers numbers them.

    0      the embeddings, as the first block gets them
    1..L-1 after that many blocks
    L      after the last block and the final norm: `last_hidden_state`

Equal to `output_hidden_states=True`, but only what is asked for is kept, and nothing above the highest number asked
for is computed. Blocks are found by their place in the model, so any decoder or encoder of Hugging Face will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.causal import unwrapped


class _Enough(Exception):
    """All states that were asked for are there."""


def blocks_of(trunk: nn.Module) -> nn.ModuleList:
    """The transformer blocks, lowest first.

    Raises:
        UserError: no list of as many modules as the configuration names layers.
    """
    model = unwrapped(trunk)
    count = int(model.config.get_text_config().num_hidden_layers)
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of {count} blocks", "layers", "read the last state: layers=null"
        )
    return found[0]  # modules() goes from the outside in: a list inside a block comes later


def layer_count(trunk: nn.Module) -> int:
    """L: the number of blocks; hidden states are numbered 0..L."""
    return len(blocks_of(trunk))


def check_layers(layers: Iterable[int], count: int, where: str) -> tuple[int, ...]:
    """Distinct layer numbers of a model of `count` blocks, in the order given.

    Raises:
        UserError: none, one twice, or one that the model does not have.
    """
    numbers = tuple(int(layer) for layer in layers)
    bad = [layer for layer in numbers if not 0 <= layer <= count]
    if bad:
        mend = f"0 (embeddings) to {count} (after the last block)"
        raise UserError(f"the model has no layer {bad[0]}", where, mend)
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"{list(numbers)} is not a list of different layers", where, "name each layer once")
    return numbers


def visit_states(
    trunk: nn.Module,
    call: Callable[[], Tensor],
    layers: Iterable[int],
    visit: Callable[[int, Tensor], None],
    blocks: nn.ModuleList | None = None,
) -> None:
    """Run a trunk and hand over the states of some layers as they arise, lowest first.

    Args:
        trunk: bare Hugging Face model, with or without adapters.
        call: runs it and returns the last hidden states (S, T, H).
        layers: 0..L; nothing above the highest of them is computed.
        visit: takes (layer, (S, T, H) states). Where gradients are wanted and activations are recomputed, it may only
            keep the states: whatever it computed would be computed twice.
        blocks: `blocks_of(trunk)`, where that is known.
    """
    blocks = blocks_of(trunk) if blocks is None else blocks
    wanted = set(layers)
    with _between_blocks(blocks, wanted, visit):
        try:
            last = call()
        except _Enough:
            return
    if len(blocks) in wanted:
        visit(len(blocks), last)


@contextmanager
def _between_blocks(blocks: nn.ModuleList, wanted: set[int], visit: Callable[[int, Tensor], None]) -> Iterator[None]:
    highest = max(wanted)

    def before(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number in wanted:
                visit(number, args[0] if args else kwargs["hidden_states"])
            if number == highest:
                raise _Enough

        return hook

    # the state that enters block k is number k; above the highest the run ends at the block's door
    handles = [
        blocks[number].register_forward_pre_hook(before(number), with_kwargs=True)
        for number in sorted(wanted)
        if number < len(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
