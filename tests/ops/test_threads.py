"""Side by side: every item once, in order, on one core each, and the setting is put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from saferlhf.ops.threads import one_thread, side_by_side


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_in_order_on_one_core_each(threads: int) -> None:
    seen = set()

    def work(item: int) -> tuple[int, int]:
        seen.add(threading.get_ident())
        barrier.wait(10)
        return item, torch.get_num_threads()

    barrier = threading.Barrier(threads)
    assert side_by_side(work, range(2 * threads)) == [(item, 1) for item in range(2 * threads)]
    assert len(seen) == threads
    assert torch.get_num_threads() == threads


def test_what_goes_wrong_is_raised_and_the_setting_put_back(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 // item, [1, 0, 2])
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads
