"""Answers by the target with SGLang: all prompts are given at once, and SGLang keeps its batch full."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torchspec.engines.arguments import check_arguments
from torchspec.engines.engine import Answer, EngineConfig, Sampling
from torchspec.engines.sglang.options import GENERATES, MARGIN, generating_arguments, set_environment
from torchspec.engines.sglang.stand_ins import install
from torchspec.engines.table import ENGINES
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig


class SGLangGenerator:
    """See the module. In the main thread: SGLang's processes end with the thread that started them.

    Args:
        config: the target.
        batch_size: answers generated at once, at most.
        device: auto, cpu or cuda.
        engine_args: of SGLang, passed on.

    Raises:
        UserError: an argument that TorchSpec owns, a release that was not run, or what SGLang refuses.
    """

    _engine: Any = None

    def __init__(self, config: TargetConfig, *, batch_size: int = 256, device: str = "auto", engine_args: dict[str, Any] | None = None) -> None:
        self.target = Target(config)
        engines = EngineConfig(batch_samples=batch_size, batch_tokens=max(8192, batch_size), engine_args=engine_args or {})
        check_arguments(engines, field="engine_args", owned=GENERATES)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        set_environment(engines, device=device, tp_size=int(engines.engine_args.get("tp_size", 1)))
        launch = importlib.import_module("torchspec.engines.sglang.launch")
        if device == "cpu":
            install()
        import sglang

        ENGINES["sglang"].check_version(sglang.__version__, allow_unknown=False)
        self._longest = int(getattr(self.target.hf_config, "max_position_embeddings", None) or 2**15)
        self._ends = self.target.end_ids()
        arguments = {"context_length": self._longest + MARGIN + 1, **generating_arguments(self.target, engines, device=device)}
        try:
            self._engine = launch.start_engine(arguments)
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            raise UserError("engine", "sglang", f"does not start ({error})", "see what it said above, or use another engine") from error

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        """Answers in the order of the prompts. A prompt that leaves no room for a token gets an empty one, finish ``length``."""
        assert sampling.temperature == 0.0, "regenerate refuses the rest: SGLang takes no seed of each answer"
        rooms = [min(sampling.max_new_tokens, self._longest - len(prompt)) for prompt in prompts]
        asked = [i for i, room in enumerate(rooms) if room > 0]
        found: dict[int, Answer] = {}
        if asked:
            parameters = [{"temperature": 0, "max_new_tokens": rooms[i], "stop_token_ids": self._ends} for i in asked]
            said = self._engine.generate(input_ids=[list(prompts[i]) for i in asked], sampling_params=parameters)
            for i, one in zip(asked, said, strict=True):
                finish = one["meta_info"]["finish_reason"]["type"]
                if finish not in ("stop", "length"):
                    raise RuntimeError(f"SGLang ended an answer: {one['meta_info']['finish_reason']}")
                found[i] = Answer(i, list(one["output_ids"]), finish)
        for i in range(len(prompts)):
            yield found.get(i, Answer(i, [], "length"))

    def close(self) -> None:
        """End SGLang's processes. Idempotent."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
