"""Replace the assistant turns of conversations by the target's own answers: drafts trained on what the target really says are accepted more often.

Turns are answered in order, each on top of the target's own earlier answers. The output grows by whole lines and is its own record of progress: rows whose id
is in it are skipped, so an interrupted run goes on where it stopped. An answer that the length limit cut ends its conversation, marked ``finish: length``.
Rows that cannot be answered go to ``<output>.failed.jsonl`` and are tried again next time. A tool call whose result is given stays as it is given: the
result belongs to it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchspec.data.conversations import MESSAGE_KEYS, Conversation, RowError, parse
from torchspec.data.exact_ids import Generated
from torchspec.data.generators import Answerer
from torchspec.data.sources import find_sources, read_rows, warn
from torchspec.data.unused import Unused
from torchspec.engines.engine import Sampling
from torchspec.errors import UserError
from torchspec.files import dumps, lines_with, refuse_foreign
from torchspec.target import Dtype

_REPLACED = (*MESSAGE_KEYS, "text", "finish", "finish_reason", "sampling", "input_ids", "loss_mask", "labels", "attention_mask", "tokenizer")
"""Fields of a row that are written anew, or left out, beside those that its messages come from."""


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
    exact: int
    """Rows written as ids: their messages would be trained as others than were generated."""


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
    generated: list[Generated] = field(default_factory=list)
    understood: bool = True
    """False: its last message is no message that others may follow."""
    kept: bool = False
    """It has an answer that was given."""

    def advance(self) -> bool:
        """Take over the messages up to the next answer to generate; False when none is left."""
        while len(self.messages) < len(self.given.messages):
            message = self.given.messages[len(self.messages)]
            if message["role"] == "assistant" and not self._has_result(len(self.messages)):
                return True
            self.kept |= message["role"] == "assistant"
            self.messages.append(message)
        return self.messages[-1]["role"] != "assistant" and self.finish == "stop"

    def written(self) -> list[dict[str, Any]]:
        """Its messages for the output: given answers that were context only are so again."""
        context = [i for i in self.given.context if i < len(self.messages) and self._has_result(i)]
        return [{**message, "weight": 0} if i in context else message for i, message in enumerate(self.messages)]

    def _has_result(self, at: int) -> bool:
        """Whether message ``at`` calls a tool and the row goes on with what it gave."""
        return at + 1 < len(self.given.messages) and self.given.messages[at + 1]["role"] == "tool"


def answer_file(
    answerer: Answerer,
    made: dict[str, Any],
    *,
    input: str,
    output: Path,
    sampling: Sampling,
    group: int = 256,
    limit: int | None = None,
    messages_key: str | None = None,
) -> RegenerateReport:
    """:func:`regenerate` with an answerer that is already there; shows progress with tokens/s and the time left.

    Args:
        answerer: gives the answers.
        made: how, for the rows to say (:func:`made_with`).
        input, output, limit, messages_key: as in :func:`regenerate`.
        sampling: how to answer.
        group: rows handed to the answerer at once.

    Raises:
        UserError: for bad input, or an output made with other settings.
    """
    from tqdm import tqdm

    done = open_output(output, made)
    _, failed_file = outputs_of(output)
    refuse_foreign(failed_file, lines_with("id", "place", "problem"), field="output", what="list of failed rows")
    unused = Unused()
    source, total = _rows(input, messages_key, limit, written=outputs_of(output), unused=unused)
    failed_file.unlink(missing_ok=True)
    skipped = tokens = cut = answered = failed = exact = 0
    started = time.monotonic()
    with output.open("ab") as sink, tqdm(total=total, desc="answering", unit="row", smoothing=0.05) as bar:

        def fail(id: str, place: str, problem: str) -> None:
            nonlocal failed
            failed += 1
            bar.update()
            with failed_file.open("a") as handle:
                handle.write(dumps({"id": id, "place": place, "problem": problem}) + "\n")

        def write(row: _Row) -> None:
            nonlocal answered, cut, exact
            finished = {**row.fields, "id": row.id, "finish": row.finish, "conversations": row.written(), "sampling": made}
            if row.generated and (ids := answerer.as_ids(finished, row.generated, kept=row.kept)):
                exact += 1
                finished |= ids
                if not row.understood:
                    del finished["conversations"]
            try:
                line = dumps(finished, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # half a character in a field of the user's
                line = dumps(finished).encode()
            sink.write(line + b"\n")
            sink.flush()
            answered += 1
            cut += row.finish == "length"
            bar.update()

        pending: list[_Row] = []
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
            for row in pending:
                if row.advance():
                    asked.append(row)
                else:
                    write(row)
            pending = []
            questions = [Conversation(tuple(row.messages), row.given.tools, template_args=row.given.template_args) for row in asked]
            for reply in answerer.answer(questions, sampling) if questions else ():
                row = asked[reply.index]
                tokens += reply.tokens
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
                if reply.message is None:
                    fail(row.id, row.place, reply.problem)
                    continue
                row.messages.append(reply.message)
                row.finish, row.understood = reply.finish, reply.understood
                if reply.generated is not None:
                    row.generated.append(reply.generated)
                if reply.finish == "length" or not reply.understood or reply.message.get("tool_calls") or not row.advance():
                    write(row)
                else:
                    pending.append(row)
    for line in unused.lines("input"):
        warn(line)
    return RegenerateReport(answered, skipped, failed, tokens, time.monotonic() - started, cut, exact)


def outputs_of(output: Path) -> tuple[Path, Path]:
    """The files that are written: answers, and rows without one."""
    return output, output.with_name(output.name + ".failed.jsonl")


def _rows(
    input: str, messages_key: str | None, limit: int | None, *, written: Sequence[Path], unused: Unused
) -> tuple[Iterator[_Row | tuple[str, str, str]], int | None]:
    """Rows to answer, or (id, place, problem) of those that cannot be, and about how many rows there are, where that is known."""
    sources = find_sources(input, config_key="input", written=written)
    every = itertools.islice(((source, line, text) for source in sources for text, line in read_rows(source, config_key="input")), limit)
    first = next(every, None)
    if first is None:
        raise UserError("input", input, "holds no rows", "check the file")
    known = [source.lines for source in sources]
    total = limit if None in known else min(sum(n for n in known if n is not None), limit or 2**63)

    def generate() -> Iterator[_Row | tuple[str, str, str]]:
        seen: dict[str, int] = {}
        for source, line, text in itertools.chain([first], every):
            place = f"{source.name}:{line}"
            try:
                conversation = parse(text, messages_key=messages_key, need_answer=False)
                if not conversation.messages:
                    raise RowError("has tokens or text instead of messages")
                fields = {k: v for k, v in json.loads(text).items() if k not in (*_REPLACED, messages_key) and k not in conversation.columns}
                unused.add(source.given, conversation.unused)
            except RowError as error:
                yield "", place, str(error)
                continue
            id = str(fields.get("id", hashlib.sha256(text).hexdigest()[:16]))
            number = seen[id] = seen.get(id, 0) + 1
            while number > 1 and f"{id}#{number}" in seen:  # another row's own id
                number += 1
            if number > 1:
                seen[id], id = number, f"{id}#{number}"
                seen[id] = 1
            yield _Row(id, place, fields, conversation, [])

    return generate(), total


def made_with(
    target: str,
    sampling: Sampling,
    *,
    engine: str = "transformers",
    revision: str | None = None,
    dtype: Dtype = "auto",
    engine_args: dict[str, Any] | None = None,
    template_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a row says of how it was made: everything that changes the answers, as JSON has it."""
    with_what = {"engine": engine, "revision": revision, "dtype": dtype, "engine_args": engine_args or {}, "template_args": template_args or {}}
    made: dict[str, Any] = json.loads(json.dumps({"target": target, **asdict(sampling), **with_what}))
    return made


def open_output(output: Path, made: dict[str, Any]) -> set[str]:
    """Ids that an earlier run finished; cuts a last line that it did not finish.

    Raises:
        UserError: when the file holds something else, or was made with other settings.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        return set()
    done = set[str]()
    whole = 0
    with output.open("rb") as handle:
        for line in handle:
            torn = not line.endswith(b"\n")
            try:
                row = json.loads(line)
                id, before = str(row["id"]), dict(row["sampling"])
            except (ValueError, KeyError, TypeError) as error:
                if torn and isinstance(error, ValueError) and b'{"'.startswith(line[:2]):
                    break
                raise UserError("output", str(output), f"holds a line that no regenerate wrote (after {len(done)} rows)", "give another output file") from None
            for name in {**made, **before}:
                if name not in before or name not in made or before[name] != made[name]:
                    raise UserError(
                        name,
                        made.get(name),
                        f"differs from {before.get(name)!r}, with which {output} was begun",
                        "use the same settings to go on, or another output file",
                    )
            if not torn:
                done.add(id)
                whole += len(line)
    with output.open("r+b") as handle:
        handle.truncate(whole)
    return done
