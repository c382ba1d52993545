"""The engines, and what each can do. Nothing else in the package decides by an engine's name.

A new engine is a folder of its own and one entry here; outside this package ``data.engine`` takes ``package.module:NAME``, where NAME is an
:class:`EngineKind`. Its class (:class:`torchspec.engines.engine.Engine`) is imported in the worker alone, so that this table costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchspec.errors import UserError
from torchspec.named import find_named


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """What an engine can do, and where it is.

    Example:
        >>> MINE = EngineKind(worker="my_package.engine:MyEngine")  # data.engine: my_package.engine:MINE
    """

    worker: str | None
    """``package.module:Class``, an ``Engine`` that is built from a ``Job`` in a worker. None: records come from disk, and there are no workers."""
    captures: bool = True
    """It writes records of whole conversations, so that ``data.engine`` may name it."""
    answers: bool = False
    """It answers prompts: as it captures them, or alone where it does not capture."""
    images: bool = False
    """It is given images."""
    remote: bool = False
    """The target runs in a server that somebody else started: a worker is a thin client and needs no device."""
    deterministic: bool = True
    """It can repeat its records bit for bit (``data.engines.deterministic``)."""
    package: str = ""
    """The library that runs the target, by the name under which it is imported."""
    versions: tuple[str, ...] = ()
    """Releases of it that this was run with: 0.26 means 0.26.*. None: all of them."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Options of ``data.engines`` that it does not obey: name, and what to do instead. Changed from its default, such an option is refused."""

    def check_version(self, version: str, *, allow_unknown: bool) -> None:
        """Refuse a release of the library that nobody has run this with.

        Args:
            version: of the library.
            allow_unknown: ``data.engines.allow_unknown_version``.

        Raises:
            UserError: it is not among :attr:`versions`, and that was not allowed.
        """
        listed = any(version == known or (version.startswith(known) and version[len(known)] in ".+-") for known in self.versions)
        if self.versions and not listed and not allow_unknown:
            known = ", ".join(f"{known}.*" for known in self.versions)
            fix = "install one of them, or set data.engines.allow_unknown_version"
            raise UserError(self.package, version, f"is not among the versions this was run with ({known})", fix)


ANSWERER = "vllm_answers"
"""The engine of workers that only answer (``data.on_policy.answer_workers``)."""
_ATTENTION = "leave it out; vLLM's own is data.engines.engine_args: {attention_backend: ...}"
_VLLM = ("0.26", "0.32")
_SGLANG = ("0.5.23",)
ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(worker="torchspec.engines.transformers.engine:TransformersEngine", images=True, package="transformers"),
    "vllm": EngineKind(
        worker="torchspec.engines.vllm.engine:VLLMEngine",
        answers=True,
        images=True,
        package="vllm",
        versions=_VLLM,
        unused={"attn_implementation": _ATTENTION},
    ),
    "vllm_remote": EngineKind(
        worker="torchspec.engines.vllm.remote:RemoteVLLMEngine",
        answers=True,
        remote=True,
        package="vllm",
        versions=_VLLM,
        unused={"attn_implementation": "leave it out; the server has its own"},
    ),
    "sglang": EngineKind(
        worker="torchspec.engines.sglang.engine:SGLangEngine",
        package="sglang",
        versions=_SGLANG,
        unused={"attn_implementation": "leave it out; SGLang's own is data.engines.engine_args: {attention_backend: ...}"},
    ),
    "sglang_remote": EngineKind(
        worker="torchspec.engines.sglang.remote:RemoteSGLangEngine",
        remote=True,
        package="sglang",
        versions=_SGLANG,
        unused={"attn_implementation": "leave it out; the server has its own"},
    ),
    "replay": EngineKind(worker=None, images=True),
    ANSWERER: EngineKind(
        worker="torchspec.engines.vllm.answering:AnsweringEngine", captures=False, answers=True, package="vllm", versions=_VLLM
    ),
}  # fmt: skip
"""By the name that ``data.engine`` takes."""


NOT_RUN = {
    "tokenspeed": "TokenSpeed 0.1 hands out no hidden states, and starts on a GPU alone",
    "tensorrt_llm": "TensorRT-LLM writes hidden states of one request at a time, without its id",
}
"""Engines that are asked for, and why there is none: what has not been run is not offered."""


def capturing(**able: bool) -> list[str]:
    """Names of engines that write records.

    Args:
        able: fields of :class:`EngineKind` that must have this value.
    """
    return [name for name, kind in ENGINES.items() if kind.captures and all(getattr(kind, key) == value for key, value in able.items())]


def find_engine(name: str) -> EngineKind:
    """The engine that ``data.engine`` names.

    Raises:
        UserError: there is none, or it writes no records.
    """
    if name in NOT_RUN:
        raise UserError("data.engine", name, f"is no engine yet ({NOT_RUN[name]}: docs/engines.md)", f"use one of {', '.join(capturing())}")
    kind = find_named(name, ENGINES, EngineKind, field="data.engine", offered=capturing())
    if not kind.captures:
        raise UserError("data.engine", name, "only answers: it writes no records", f"use one of {', '.join(capturing())}")
    return kind
