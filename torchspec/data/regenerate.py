"""Replace the assistant turns of conversations by the target's own answers: drafts trained on what the target really says are accepted more often.

Turns are answered in order, each on top of the target's own earlier answers. The output grows by whole lines and is its own record of progress: rows whose id
is in it are skipped, so an interrupted run goes on where it stopped. An answer that the length limit cut ends its conversation, marked ``finish: length``.
Rows that cannot be answered go to ``<output>.failed.jsonl`` and are tried again next time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchspec.data.conversations import Conversation, RowError, parse
from torchspec.data.render import Renderer
from torchspec.data.sources import find_sources, read_rows
from torchspec.engines.engine import Generator, Sampling
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

_GROUP = 8
"""Rows answered together, in batches of the generator: enough to sort by length, few enough to lose little when stopped."""


@dataclass(frozen=True)
class RegenerateReport:
    """What a run did."""

    answered: int
    skipped: int
    """Rows that the output already had."""
    failed: int
    tokens: int
    seconds: float
    cut: int
    """Conversations ended by the length limit."""
    retokenised: int
    """Answers whose text renders to other ids than were generated (they are trained as rendered)."""


@dataclass
class _Row:
    """A conversation on its way."""

    id: str
    place: str
    fields: dict[str, Any]
    given: Conversation
    messages: list[dict[str, Any]]
    """Finished so far."""
    finish: str = "stop"

    def advance(self) -> bool:
        """Take over the messages up to the next answer to generate; False when none is left."""
        while len(self.messages) < len(self.given.messages):
            message = self.given.messages[len(self.messages)]
            if message["role"] == "assistant":
                return True
            self.messages.append(message)
        return self.messages[-1]["role"] != "assistant" and self.finish == "stop"


def regenerate(
    target: str,
    *,
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
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    engine: str = "transformers",
    engine_args: dict[str, Any] | None = None,
) -> RegenerateReport:
    """Answer the prompts of a conversation file with the target itself.

    Args:
        target: hub id or directory of the target.
        input: conversation file, folder or hub id; rows may also be a ``prompt`` alone.
        output: jsonl file to write or to go on with.
        max_new_tokens: length limit of an answer.
        temperature: 0 takes the most likely token each time.
        top_p: nucleus sampling.
        seed: of the sampling.
        batch_size: conversations answered at once.
        limit: rows of the input to take; all of them when empty.
        messages_key: column of the messages; empty takes conversations or messages.
        revision: branch, tag or commit of a hub id.
        dtype: auto, bfloat16, float16 or float32.
        device: auto, cpu, or a CUDA device.
        trust_remote_code: run modelling code that ships with the target.
        engine: transformers or vllm.
        engine_args: of vLLM, passed on.

    Returns:
        Counts, tokens and seconds.

    Raises:
        UserError: for bad input, or an output made with other settings.
    """
    if engine not in ("transformers", "vllm"):
        raise UserError("engine", engine, "is unknown", "use transformers or vllm")
    if engine_args and engine != "vllm":
        raise UserError("engine_args", engine_args, f"has no meaning for engine {engine}", "leave it out")
    config = TargetConfig(target, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    # what is wrong is found before a model is loaded
    find_sources(input, config_key="input")
    Renderer(Target(config).tokenizer(), name=target)
    _open_output(Path(output), _made_with(config, sampling))
    generator = _generator(engine, config, batch_size=batch_size, device=device, engine_args=engine_args or {})
    try:
        return answer_file(
            generator, config, input=input, output=Path(output), sampling=sampling, group=_GROUP * batch_size, limit=limit, messages_key=messages_key
        )
    finally:
        generator.close()


def _generator(engine: str, config: TargetConfig, *, batch_size: int, device: str, engine_args: dict[str, Any]) -> Generator:
    if engine == "vllm":
        from torchspec.engines.vllm.generator import VLLMGenerator

        return VLLMGenerator(config, batch_size=batch_size, device=device, engine_args=engine_args)
    from torchspec.engines.transformers_generator import TransformersGenerator

    return TransformersGenerator(config, batch_size=batch_size, device=device)


def answer_file(
    generator: Generator,
    config: TargetConfig,
    *,
    input: str,
    output: Path,
    sampling: Sampling,
    group: int = 256,
    limit: int | None = None,
    messages_key: str | None = None,
) -> RegenerateReport:
    """:func:`regenerate` with a generator that is already there; shows progress with tokens/s.

    Args:
        generator: answers prompts.
        config: the target, whose chat template renders them.
        input, output, limit, messages_key: as in :func:`regenerate`.
        sampling: how to answer.
        group: rows handed to the generator at once.

    Raises:
        UserError: for bad input, or an output made with other settings.
    """
    from tqdm import tqdm

    renderer = Renderer(Target(config).tokenizer(), name=config.path)
    made = _made_with(config, sampling)
    done = _open_output(output, made)
    failed_file = output.with_name(output.name + ".failed.jsonl")
    failed_file.unlink(missing_ok=True)
    rows, total = _rows(input, messages_key, limit)
    skipped = tokens = cut = answered = failed = retokenised = 0
    started = time.monotonic()
    with output.open("a") as sink, tqdm(total=total, desc="answering", unit="row", smoothing=0.05) as bar:

        def fail(id: str, place: str, problem: str) -> None:
            nonlocal failed
            failed += 1
            bar.update()
            with failed_file.open("a") as handle:
                handle.write(json.dumps({"id": id, "place": place, "problem": problem}) + "\n")

        def write(row: _Row) -> None:
            nonlocal answered, cut
            finished = {**row.fields, "id": row.id, "finish": row.finish, "conversations": row.messages, "sampling": made}
            sink.write(json.dumps(finished, ensure_ascii=False) + "\n")
            sink.flush()
            answered += 1
            cut += row.finish == "length"
            bar.update()

        pending: list[_Row] = []
        source = iter(rows)
        exhausted = False
        while not exhausted or pending:
            while len(pending) < group and not exhausted:
                item = next(source, None)
                if item is None:
                    exhausted = True
                elif isinstance(item, _Row):
                    if item.id in done:
                        skipped += 1
                        bar.update()
                    else:
                        pending.append(item)
                else:
                    fail(*item)
            asked: list[_Row] = []
            prompts: list[list[int]] = []
            for row in pending:
                try:
                    if not row.advance():
                        write(row)
                        continue
                    prompts.append(renderer.prompt(Conversation(messages=tuple(row.messages), tools=row.given.tools), len(row.messages)))
                    asked.append(row)
                except RowError as error:
                    fail(row.id, row.place, str(error))
            pending = []
            for answer in generator.generate(prompts, sampling) if prompts else ():
                row = asked[answer.index]
                tokens += len(answer.ids)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
                text = renderer.text_of(answer.ids)
                if not text.strip():
                    fail(row.id, row.place, f"got an empty answer to message {len(row.messages) - 1}")
                    continue
                retokenised += not renderer.shows_as_generated(prompts[answer.index], answer.ids, row.messages, text, row.given.tools)
                row.messages.append({"role": "assistant", "content": text})
                row.finish = answer.finish
                if answer.finish == "length" or not row.advance():
                    write(row)
                else:
                    pending.append(row)
    return RegenerateReport(answered, skipped, failed, tokens, time.monotonic() - started, cut, retokenised)


def _rows(input: str, messages_key: str | None, limit: int | None) -> tuple[Iterator[_Row | tuple[str, str, str]], int]:
    """Rows to answer, or (id, place, problem) of those that cannot be, and how many rows there are."""
    sources = find_sources(input, config_key="input")
    places = [(source, line, text) for source in sources for text, line in read_rows(source, config_key="input")][:limit]
    if not places:
        raise UserError("input", input, "holds no rows", "check the file")

    def generate() -> Iterator[_Row | tuple[str, str, str]]:
        seen: dict[str, int] = {}
        for source, line, text in places:
            place = f"{source.name}:{line}"
            try:
                conversation = parse(text, messages_key=messages_key, need_answer=False)
                if conversation.input_ids is not None:
                    raise RowError("has tokens instead of messages")
                fields = {k: v for k, v in json.loads(text).items() if k not in ("conversations", "messages", "prompt", "finish", "sampling", messages_key)}
            except RowError as error:
                yield "", place, str(error)
                continue
            id = str(fields.get("id", hashlib.sha256(text).hexdigest()[:16]))
            seen[id] = seen.get(id, 0) + 1
            id = id if seen[id] == 1 else f"{id}#{seen[id]}"
            if conversation.messages[0]["role"] == "assistant":
                yield id, place, "begins with an answer"
                continue
            yield _Row(id, place, fields, conversation, [])

    return generate(), len(places)


def _made_with(config: TargetConfig, sampling: Sampling) -> dict[str, Any]:
    """What a row says of how it was made."""
    return {"target": config.path, **asdict(sampling)}


def _open_output(output: Path, made: dict[str, Any]) -> set[str]:
    """Ids that an earlier run finished; cuts a last line that it did not finish.

    Raises:
        UserError: when the file holds something else, or was made with other settings.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        return set()
    done = set()
    whole = 0
    with output.open("rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                done.add(row["id"])
                before = row["sampling"]
            except (ValueError, KeyError, TypeError):
                raise UserError("output", str(output), f"holds a line that no regenerate wrote (after {len(done)} rows)", "give another output file") from None
            for name, value in made.items():
                if before.get(name) != value:
                    raise UserError(
                        name,
                        value,
                        f"differs from {before.get(name)!r}, with which {output} was begun",
                        "use the same settings to go on, or another output file",
                    )
            whole += len(line)
    with output.open("r+b") as handle:
        handle.truncate(whole)
    return done
