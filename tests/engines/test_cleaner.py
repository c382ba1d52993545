"""Deleting for the coordinator: what is deleted again when a worker was lost."""

from __future__ import annotations

from torchspec.engines.cleaner import LateKeys


def test_keys_of_lost_workers_come_up_again_and_then_no_more() -> None:
    late = LateKeys(10.0)
    late.add(["a", "b"], now=0.0)
    late.add([], now=0.0)
    late.add(["c"], now=5.0)
    found = {now: keys for now in range(0, 400, 5) if (keys := late.due(float(now)))}
    assert {now for now, keys in found.items() if "a" in keys} == {10, 30, 70, 150}
    assert {now for now, keys in found.items() if "c" in keys} == {15, 35, 75, 155}
    assert all(("a" in keys) == ("b" in keys) for keys in found.values())
