"""Numbers with which a run would spin, wait without end or mean nothing: refused by name before anything starts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from torchspec.engines.engine import EngineConfig, OnPolicy, Sampling
from torchspec.errors import UserError


@pytest.mark.parametrize(
    ("kind", "field", "name", "values"),
    [
        (EngineConfig, "data.engines.", "workers", [-1]),
        (EngineConfig, "data.engines.", "batch_tokens", [0, -5]),
        (EngineConfig, "data.engines.", "batch_samples", [0]),
        (EngineConfig, "data.engines.", "threads", [0]),
        (EngineConfig, "data.engines.", "max_attempts", [0]),
        (EngineConfig, "data.engines.", "max_restarts", [-1]),
        (EngineConfig, "data.engines.", "start_timeout", [0.0, -1.0, math.inf, math.nan]),
        (EngineConfig, "data.engines.", "lease_timeout", [0.0, math.nan]),
        (EngineConfig, "data.engines.", "silence_timeout", [0.0]),
        (EngineConfig, "data.engines.", "max_failed_fraction", [-0.1, 1.5, math.nan]),
        (Sampling, "", "max_new_tokens", [0]),
        (Sampling, "", "temperature", [-1.0, math.nan, math.inf]),
        (Sampling, "", "top_p", [0.0, 7.0, math.nan]),
        (Sampling, "", "seed", [-1]),
        (OnPolicy, "data.on_policy.", "max_new_tokens", [1]),
        (OnPolicy, "data.on_policy.", "temperature", [-1.0]),
        (OnPolicy, "data.on_policy.", "top_p", [0.0]),
        (OnPolicy, "data.on_policy.", "seed", [-1]),
    ],
)
def test_settings_of_engines_and_sampling(kind: Any, field: str, name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(UserError) as caught:
            kind(**{name: value})
        assert (caught.value.field, repr(caught.value.value)) == (field + name, repr(value))
    kind()
