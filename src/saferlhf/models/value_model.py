"""Values of states: a score model read at every token instead of at the last one.

The state s_t is the prompt and the response's tokens before t. Its value is what the score model says of that text as
it stands:

    V(s_t) = head(pool(states of the tokens before t))

with the pooling and the layers of the score model: for `last` the state of token t - 1, for `mean` the mean over all
tokens up to t - 1, for several layers their states side by side. A critic that starts from a reward model therefore
begins with that model's opinion of each unfinished response, and its value behind the last token is the score itself.

Heads are linear, so the mean's score is the mean of the scores: one product per token, and running sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saferlhf.errors import UserError
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.sequences import last_index


def check_critic(model: ScoreModel, where: str) -> None:
    """Refuse score models that cannot be read token by token.

    Raises:
        UserError: a kernel before the head, or prompt and response pooled apart.
    """
    if model.kernel is not None or model.span != "all":
        what = "its head is not linear in hidden states" if model.kernel is not None else f"it pools the {model.span}"
        raise UserError(
            f"this model cannot be read token by token: {what}", where, "start the critic from another model"
        )


def prefix_scores(model: ScoreModel, head: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the model would score each row if it ended at that token.

    Args:
        model: reads the whole sequence (span "all"), causal, without a kernel.
        head: one of its heads, of width 1.
        input_ids: (S, T) int64.
        attention_mask: (S, T) bool or int, True = real token; any padding side.

    Returns:
        (S, T) float32, 0 at padding.
    """
    mask = attention_mask.bool()
    if model.layers is None:
        states = model.hidden(input_ids, attention_mask)  # (S, T, H)
    else:
        kept: dict[int, Tensor] = {}
        model.visit(input_ids, attention_mask, model.layers, kept.__setitem__)
        states = torch.cat([kept[layer] for layer in model.layers], dim=-1)  # (S, T, F)
    # what stands at padding may be NaN, and NaN times zero is NaN
    scores = model.heads[head](states).squeeze(-1).masked_fill(~mask, 0.0)  # (S, T)
    if model.pooling == "mean":
        scores = scores.cumsum(dim=-1) / mask.cumsum(dim=-1).clamp_min(1)
    return scores.masked_fill(~mask, 0.0)


def token_values(scores: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """From scores of prefixes to values of states.

    Args:
        scores: (S, T) of `prefix_scores`.
        attention_mask: (S, T) bool or int, True = real token.

    Returns:
        (S, T) value before each token (0 at a row's first token and at padding), and (S,) value behind the last token,
        from which a truncated response may be bootstrapped.
    """
    mask = attention_mask.bool()
    before = scores[:, :-1].masked_fill(~(mask[:, :-1] & mask[:, 1:]), 0.0)
    behind = scores.gather(1, last_index(mask).unsqueeze(1)).squeeze(1)
    return F.pad(before, (1, 0)), behind
