"""Buffers where there is a GPU: page-locked on the host, registered (or staged) on the device, for both kinds of store."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from torchspec.transfer import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NBYTES = 32 << 20


def test_host_buffer_is_page_locked(store: Store) -> None:
    assert store.buffer(1000).is_pinned()


@pytest.mark.parametrize("source_place", ["buffer", "elsewhere"])
@pytest.mark.parametrize("out_place", ["buffer", "elsewhere", "cpu"])
def test_device_memory(store: Store, new_key: Callable[[], str], source_place: str, out_place: str) -> None:
    """What a kernel on the current stream has just been asked to write is what arrives."""
    key = new_key()
    source = store.buffer(NBYTES, device="cuda") if source_place == "buffer" else torch.empty(NBYTES, dtype=torch.uint8, device="cuda")
    out = (
        store.buffer(NBYTES, device="cuda") if out_place == "buffer" else torch.empty(NBYTES, dtype=torch.uint8, device=out_place.replace("elsewhere", "cuda"))
    )
    for number in range(3):
        source.random_(0, 256)
        source[:8] = number
        out.zero_()
        store.put([f"{key}/{number}"], [source])
        assert store.get([f"{key}/{number}"], [out]) == [NBYTES]
        assert torch.equal(out.cpu(), source.cpu())
        store.delete([f"{key}/{number}"])
