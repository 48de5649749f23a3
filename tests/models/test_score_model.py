"""Scores that depend on the tokens alone: not on padding, batch, pad token or precision context."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import backbone, backbone_config, padded, rows, score_model

from saferlhf.models.backbone import load_backbone
from saferlhf.models.heads import build_heads, head_widths
from saferlhf.models.score_model import ScoreModel, first_position

FAMILIES = ("llama", "gpt2", "bert", "roberta")


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_scores_however_padded_alone_or_batched(family: str, pooling: str) -> None:
    model, sequences = score_model(family, pooling=pooling), rows()
    with torch.no_grad():
        alone = [model(row[None], torch.ones(1, len(row)).bool()) for row in sequences]
        for name in ("cost", "moderation"):
            expected = torch.cat([scores[name] for scores in alone])
            assert expected.std() > 0.01, "scores that are all alike would prove nothing"
            for side in ("right", "left", "both"):
                for pad in (0, 2):  # 2 is the end-of-sequence token: pad = eos
                    for extra in (0, 3):
                        got = model(*padded(sequences, side, pad, extra))[name]
                        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_real_token_is_read_also_when_the_pad_token_ends_sequences(family: str) -> None:
    model = score_model(family)
    row = rows(1, longest=8)[0]
    with_end, without = row, row[:-1]
    with torch.no_grad():
        both = model(*padded([with_end, without], "right", pad=2))["cost"][:, 0]
    # the ids of the two rows are equal after padding with eos; only the mask tells them apart
    assert not torch.allclose(both[0], both[1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_row_scores_its_bias_and_leaves_the_batch_alone(family: str) -> None:
    model = score_model(family).train()
    ids, mask = padded(rows(3), "right")
    mask[1] = False
    model.eval()
    scores = model(ids, mask)["cost"]
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores[1], model.heads["cost"].bias)
    scores.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        others = model(ids[[0, 2]], mask[[0, 2]])["cost"]
    torch.testing.assert_close(scores[[0, 2]].detach(), others, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_takes_a_gradient(family: str) -> None:
    model = score_model(family)
    ids, mask = padded(rows(4), "right")
    sum(scores.square().sum() for scores in model(ids, mask).values()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == []


class StrictAttention(torch.nn.Module):
    """A trunk whose masking divides zero by zero in a row without a real token, as some attention kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4))
        self.embedding = torch.nn.Embedding(64, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        weights = torch.zeros(attention_mask.shape).masked_fill(attention_mask == 0, -torch.inf).softmax(-1)  # (S, T)
        states = self.embedding(input_ids)
        return SimpleNamespace(last_hidden_state=states + (weights.unsqueeze(-1) * states).sum(1, keepdim=True))


def test_an_empty_row_is_harmless_to_attention_that_cannot_take_one() -> None:
    model = ScoreModel(StrictAttention(), {"cost": 1})
    ids, mask = padded(rows(3), "right")
    mask[1] = False
    scores = model(ids, mask)["cost"]
    scores.sum().backward()
    assert torch.isfinite(scores).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_embedding_of_the_end_token_learns_when_it_is_the_pad_token_too() -> None:
    trunk = load_backbone(backbone_config(), vocabulary_size=64, pad_token_id=2, eos_token_id=2)
    model = ScoreModel(trunk, {"reward": 1}, pooling="mean")
    ids, mask = padded(rows(3), "right", pad=2)
    model(ids, mask)["reward"].sum().backward()
    assert trunk.get_input_embeddings().weight.grad[2].abs().sum() > 0


def test_roberta_positions_start_after_its_padding_row() -> None:
    assert first_position(backbone("roberta")) == 1, "its pad token is 0 here"
    assert first_position(backbone("bert")) == first_position(backbone("gpt2")) == 0
    # its own forward, unpadded, counts positions the same way
    trunk, row = backbone("roberta").eval(), rows(1)[0][None]
    model = ScoreModel(trunk, {"reward": 1})
    with torch.no_grad():
        own = trunk(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
        torch.testing.assert_close(model.hidden(row, torch.ones_like(row)), own)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_unpadded_hidden_states_are_the_models_own(family: str) -> None:
    trunk, row = backbone(family).eval(), rows(1)[0][None]
    with torch.no_grad():
        own = trunk(input_ids=row).last_hidden_state
        got = ScoreModel(trunk, {"reward": 1}).hidden(row, torch.ones_like(row))
    torch.testing.assert_close(got, own)


def test_heads_compute_in_float32_under_bfloat16_autocast() -> None:
    model = score_model("llama")
    ids, mask = padded(rows(), "right")
    with torch.no_grad():
        plain = model(ids, mask)["cost"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(ids, mask)["cost"]
    assert plain.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, atol=0.05, rtol=0)
    # the head itself lost nothing: the same state gives the same score to the last bit
    state = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.heads["cost"](state)
    assert torch.equal(inside, model.heads["cost"](state))


def test_heads_work_when_a_precision_plugin_casts_the_whole_model() -> None:
    model = score_model("llama").to(torch.bfloat16)
    scores = model(*padded(rows(), "right"))["cost"]
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


def test_fresh_heads_are_seeded_small_and_without_bias() -> None:
    heads, again = build_heads(4096, {"cost": 1, "moderation": 3}, seed=7), build_heads(4096, {"cost": 1}, seed=7)
    assert torch.equal(heads["cost"].weight, again["cost"].weight), "another head must not change this one"
    assert not torch.equal(heads["cost"].weight, build_heads(4096, {"cost": 1}, seed=8)["cost"].weight)
    assert not torch.equal(heads["cost"].weight[0], heads["moderation"].weight[0])
    assert head_widths(heads) == {"cost": 1, "moderation": 3}
    assert all(head.bias.abs().sum() == 0 and head.bias.requires_grad for head in heads.values())
    scores = heads["moderation"](torch.randn(2000, 4096))
    assert scores.std().item() == pytest.approx(0.1, rel=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        build_heads(8, {"cost": 0})


def test_unknown_pooling_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown pooling"):
        ScoreModel(backbone(), {"cost": 1}, pooling="first")
