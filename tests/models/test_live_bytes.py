"""Bytes of tensors that are alive: hand-counted, against PyTorch's own hooks, and told apart by kind."""

from __future__ import annotations

import torch
from torch import nn

from saferlhf.models.live_bytes import Bytes, LiveBytes
from saferlhf.models.shapes import faking


def test_by_hand() -> None:
    live = LiveBytes()
    known = torch.zeros(100)
    live.ignore([known])
    with live:
        a = torch.zeros(10)  # 40 bytes
        b = a + 1  # 80
        b.add_(1)  # in place
        c = b.view(2, 5)  # a view
        assert live.now.total == 80
        del b
        assert live.now.total == 80, "the view holds it"
        del c
        assert live.now.total == 40
        d = known[:50]
        assert live.now.total == 40, "a view of what was known"
        del a, d
    assert live.now.total == 0
    assert live.highest().total == 80


def test_kinds_are_told_apart() -> None:
    layer = nn.Linear(4, 7, bias=False)
    live = LiveBytes(vocabulary=7)
    x = torch.zeros(3, 4)
    live.ignore([*layer.parameters(), x])
    live.watch_gradients(layer.parameters())
    with live:
        logits = layer(x)
        assert live.now == Bytes(logits=3 * 7 * 4)
        logits.logsumexp(dim=-1).sum().backward()
        del logits
    assert live.now == Bytes(gradients=28 * 4)


def test_windows_hold_their_own_highest() -> None:
    live = LiveBytes()
    with live:
        a = torch.zeros(25)
        del a
        live.enter("later")
        b = torch.zeros(10)
        del b
    assert live.highest("").total == 100
    assert live.highest("later").total == 40
    assert live.highest().total == 100


def test_what_the_backward_pass_keeps_is_what_autograd_says() -> None:
    """The second implementation: the storages that autograd saves, seen through its hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8), nn.Softmax(dim=-1))
    x = torch.randn(5, 8)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), x]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    live = LiveBytes()
    live.ignore([*model.parameters(), x])
    with live:
        again = model(x)
        kept = live.now.total
    # the softmax saves its output
    assert kept == sum(saved.values())
    assert torch.equal(out, again)


def test_fake_tensors_count_as_real_ones() -> None:
    def highest(fake: bool) -> Bytes:
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        live = LiveBytes()
        x = torch.zeros(9, 16)
        live.ignore([*model.parameters(), x])
        live.watch_gradients(model.parameters())
        with live:
            model(x).square().sum().backward()
        return live.highest()

    with faking():
        counted = highest(True)
    assert counted == highest(False)
    assert counted.total > 9 * 64 * 4
