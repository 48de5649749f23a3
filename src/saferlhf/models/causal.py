"""The two halves of a causal language model: hidden states, and the layer that turns them into logits.

Taken apart so that losses can project only the positions they score (`ops/losses.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saferlhf.ops.sequences import position_ids


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if get_base is not None else model


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states after the final norm, (S, T, H).

    Args:
        model: a causal language model, adapters included.
        input_ids: (S, T).
        attention_mask: (S, T), True = real token; position ids come from it.
    """
    trunk = unwrapped(model).base_model
    output = trunk(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
    )
    return output.last_hidden_state


def output_layer(model: nn.Module) -> nn.Module:
    """The layer from hidden states to logits."""
    return unwrapped(model).get_output_embeddings()
