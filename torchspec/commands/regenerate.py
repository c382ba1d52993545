"""``main.py regenerate``: the target answers the prompts of a conversation file itself (``data/regenerate.py``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torchspec.data.conversations import Conversation, RowError, parse
from torchspec.data.files import kind_of
from torchspec.data.generators import Answerer, EngineAnswerer, ServerAnswerer
from torchspec.data.outputs import check_device, output_file
from torchspec.data.regenerate import RegenerateReport, answer_file, made_with, open_output, outputs_of
from torchspec.data.render import Renderer
from torchspec.data.served import LOOKED_AT, check_served
from torchspec.data.sources import Source, find_sources, read_rows
from torchspec.engines.engine import Generator, Sampling
from torchspec.errors import UserError
from torchspec.target import Dtype, Target, TargetConfig

_OWNED = {
    "model": "--target",
    "messages": "--input",
    "tools": "the rows' own tools",
    "max_tokens": "--max_new_tokens",
    "max_completion_tokens": "--max_new_tokens",
    "temperature": "--temperature",
    "top_p": "--top_p",
    "seed": "--seed",
    "chat_template_kwargs": "--template_args",
    "n": "one answer a question",
    "stream": "whole answers",
}
"""Parts of a server's request that ``engine_args`` may not set, and what does."""
_GROUP = 8
"""Rows answered together, in batches of the generator: enough to sort by length, few enough to lose little when stopped."""


def regenerate(
    target: str,
    input: str,
    output: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    limit: int | None = None,
    messages_key: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    engine: Literal["transformers", "vllm", "sglang", "server"] = "transformers",
    engine_args: dict[str, Any] | None = None,
    server: str | None = None,
    template_args: dict[str, Any] | None = None,
) -> RegenerateReport:
    """Answer the prompts of a conversation file with the target itself.

    Args:
        target: hub id or directory of the target; with a server, its name there.
        input: conversation file, folder or hub id; the assistant turns in it are replaced.
        output: jsonl file to write, or to go on with.
        max_new_tokens: length limit of an answer.
        temperature: 0 takes the most likely token each time.
        top_p: nucleus sampling.
        seed: of the sampling.
        batch_size: conversations answered at once (requests at once, with a server).
        limit: rows of the input to take; all of them when empty.
        messages_key: column of the messages; empty takes conversations or messages.
        revision: branch, tag or commit of a hub id.
        dtype: auto, bfloat16, float16 or float32.
        device: auto, cpu, or a CUDA device such as cuda:0.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
        engine: transformers, vllm or sglang (much faster where they run), or server (any OpenAI-compatible one; its key comes from OPENAI_API_KEY).
        engine_args: engine arguments of vLLM or SGLang, as they are; with a server, added to every request.
        server: address of the server's interface, such as http://127.0.0.1:8000/v1.
        template_args: variables for the chat template, such as {"enable_thinking": false}.

    Returns:
        Counts, tokens and seconds.

    Raises:
        UserError: for bad input, or an output made with other settings.
    """
    if engine not in ("transformers", "vllm", "sglang", "server"):
        raise UserError("engine", engine, "is unknown", "use transformers, vllm, sglang or server")
    if engine_args and engine == "transformers":
        raise UserError("engine_args", engine_args, f"has no meaning for engine {engine}", "leave it out")
    if (server is not None) != (engine == "server"):
        raise UserError("server", server, f"does not go with engine {engine}", "give both --engine server and --server URL, or none")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(name, value, "is below 1", "use 1 or more")
    if engine == "sglang" and temperature > 0.0:
        problem = "is random sampling, for which SGLang takes no seed of each answer: they would not repeat"
        raise UserError("temperature", temperature, problem, "set it to 0, or use engine vllm or transformers")
    if owned := sorted(_OWNED.keys() & (engine_args or {}).keys()) if engine == "server" else []:
        raise UserError("engine_args", engine_args, f"sets {owned[0]}, which is an option of its own", f"use {_OWNED[owned[0]]}")
    check_device(device)
    path = output_file(output, field="output")
    if kind_of(path.name) not in (None, ("jsonl", ""), ("json", "")):
        raise UserError("output", output, "would hold JSON lines under the name of another kind of file", "name it .jsonl")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    # what is wrong is found before a model is loaded
    sources = find_sources(input, config_key="input", written=outputs_of(path), say=lambda line: None)
    made = made_with(target, sampling, engine=engine, revision=revision, dtype=dtype, engine_args=engine_args, template_args=template_args)
    open_output(path, made)
    if server is not None:
        extra = {**({"chat_template_kwargs": template_args} if template_args else {}), **(engine_args or {})}
        answerer: Answerer = ServerAnswerer(server, model=target, concurrency=batch_size, extra=extra)
    else:
        config = TargetConfig(target, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        facts = Target(config)
        tokenizer, ends = facts.tokenizer(), facts.end_ids()
        trained = Renderer(tokenizer, name=target, end_ids=ends)
        check_served(trained, facts.served, _first_conversations(sources, messages_key), name=target)
        renderer = Renderer(tokenizer, name=target, end_ids=ends, variables=template_args) if template_args else trained
        generator = _generator(engine, config, batch_size=batch_size, device=device, engine_args=engine_args or {})
        answerer = EngineAnswerer(generator, renderer, trained)
    try:
        report = answer_file(answerer, made, input=input, output=path, sampling=sampling, group=_GROUP * batch_size, limit=limit, messages_key=messages_key)
    finally:
        answerer.close()
    rate = report.tokens / report.seconds if report.seconds else 0.0
    print(
        f"{report.answered} answered, {report.skipped} were there, {report.failed} failed, {report.cut} cut by the length limit, "
        f"{report.exact} written as token ids (their messages would render to others); "
        f"{report.tokens} tokens at {rate:.0f} tokens/s -> {output}"
    )
    return report


def _generator(engine: str, config: TargetConfig, *, batch_size: int, device: str, engine_args: dict[str, Any]) -> Generator:
    if engine == "vllm":
        from torchspec.engines.vllm.generator import VLLMGenerator

        return VLLMGenerator(config, batch_size=batch_size, device=device, engine_args=engine_args)
    if engine == "sglang":
        from torchspec.engines.sglang.generator import SGLangGenerator

        return SGLangGenerator(config, batch_size=batch_size, device=device, engine_args=engine_args)
    from torchspec.engines.transformers.generator import TransformersGenerator

    return TransformersGenerator(config, batch_size=batch_size, device=device)


def _first_conversations(sources: Sequence[Source], messages_key: str | None) -> Iterator[Conversation]:
    """Those that show whether the tokenizer is the served one."""
    for source in sources:
        for text, _ in itertools.islice(read_rows(source, config_key="input"), LOOKED_AT):
            try:
                yield parse(text, messages_key=messages_key, need_answer=False)
            except RowError:
                continue  # said when its turn comes
