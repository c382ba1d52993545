"""Random conversations in every chat format: what is supervised, what a generated answer becomes, and regenerating them in any order, stopped anywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import families
from tests.data.families import CALL, FAMILIES, TOOLS, supervised, tokenizer
from tests.data.test_exact_ids import generated, renderer
from torchspec.data.conversations import Conversation, Message, RowError
from torchspec.data.exact_ids import ExactRows
from torchspec.data.generators import EngineAnswerer
from torchspec.data.regenerate import answer_file
from torchspec.data.tokenise import Tokenise
from torchspec.engines.engine import Answer, Sampling

TEXTS = ("two three", "because it is", "é ü 漢字 🙂", "a\n\nb", " lead", "trail ", "so\tit", "x")


def conversation(chance: random.Random) -> Conversation:
    """Questions that may repeat, with or without system, tools, several calls, thinking and empty answers."""

    def thinks() -> dict[str, str]:
        return {"reasoning_content": "hm " + chance.choice(TEXTS)} if chance.random() < 0.4 else {}

    tools = TOOLS if chance.random() < 0.5 else None
    messages: list[Message] = [{"role": "system", "content": chance.choice(TEXTS)}] if chance.random() < 0.3 else []
    for _ in range(chance.choice((1, 1, 2, 3))):
        messages.append({"role": "user", "content": chance.choice(TEXTS)})
        while tools and chance.random() < 0.4:
            calls = [CALL, {**CALL, "id": "c2"}][: chance.choice((1, 1, 2))]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **thinks()})
            messages += [{"role": "tool", "name": "find", "tool_call_id": call["id"], "content": chance.choice(TEXTS)} for call in calls]
        messages.append({"role": "assistant", "content": "" if chance.random() < 0.1 else chance.choice(TEXTS), **thinks()})
    return Conversation(messages=tuple(messages), tools=tools)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_run_of_the_mask_is_one_answer_behind_what_serving_sends(name: str) -> None:
    render, tried = renderer(name), 0
    for seed in range(12):
        one = conversation(random.Random(seed))
        try:
            made = render.render(one)
        except RowError:
            continue  # it always thinks, and these answers do not
        variables = render.template.variables(one)
        begins: dict[int, Message] = {}
        for i, message in enumerate(one.messages):
            if message["role"] == "assistant":
                sent = render.template.text(one.messages[:i], one.tools, generate=True, variables=variables)
                ids = tokenizer(name)(sent, add_special_tokens=False)["input_ids"]
                if made.ids[: len(ids)].tolist() == ids:
                    begins[len(ids)] = message
        bounds = np.flatnonzero(np.diff(np.concatenate([[0], made.mask, [0]])))
        for begin, end, text in zip(bounds[::2].tolist(), bounds[1::2].tolist(), supervised(tokenizer(name), made), strict=True):
            message = begins[begin]
            assert message["content"].strip() in text and "\ufffd" not in text
            assert all(call["function"]["name"] in text or call["id"] in text for call in message.get("tool_calls", ()))
            ends = [j for j in range(begin, end) if render.ends(int(made.ids[j]))]
            assert ends == [end - 1] or (name == "gpt-oss" and not ends)  # its history shows another end than was generated
            tried += 1
    assert tried >= (2 if name in ("deepseek-r1", "minimax-m2") else 12)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_that_were_cut_stop_at_their_last_word_or_thought(name: str) -> None:
    render, tried = renderer(name), 0
    for seed in range(12):
        one = conversation(random.Random(seed))
        last = one.messages[-1]
        try:
            whole = render.render(one)
            made = render.render(replace(one, cut=frozenset(range(len(one.messages)))))
        except RowError:
            continue  # no answer, or none that has a word
        shown = len(made.ids)  # GLM's end token is not there
        assert made.ids.tolist() == whole.ids[:shown].tolist() and len(whole.ids) - shown in (0, 1) and (made.mask <= whole.mask[:shown]).all()
        assert not any(render.ends(token) for token in made.ids[made.mask == 1].tolist())
        if whole.mask[-3:].any() and (said := last["content"].strip() or last.get("reasoning_content", "").strip()):
            assert supervised(tokenizer(name), made)[-1].strip().endswith(said)
            tried += 1
    assert tried >= (1 if name in ("deepseek-r1", "minimax-m2") else 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_generated_answer_is_its_message_whichever_rows_came_before(name: str) -> None:
    asked: list[tuple[Conversation, list[int]]] = []
    for seed in range(8):
        one = conversation(random.Random(seed))
        for i, message in enumerate(one.messages):
            upto = Conversation(one.messages[: i + 1], one.tools)
            if message["role"] == "assistant" and (shown := renderer(name).shown(upto)) is not None:
                asked.append((upto, generated(name, shown)))
    first, last = ExactRows(renderer(name)), ExactRows(renderer(name))
    answers = [first.message(Conversation(one.messages[:-1], one.tools), ids, cut=False) for one, ids in asked]
    assert answers == [last.message(Conversation(one.messages[:-1], one.tools), ids, cut=False) for one, ids in reversed(asked)][::-1]
    assert answers == [ExactRows(renderer(name)).message(Conversation(one.messages[:-1], one.tools), ids, cut=False) for one, ids in asked]
    for (one, ids), answer in zip(asked, answers, strict=True):
        given, text = one.messages[-1], tokenizer(name).decode(ids)
        if given.get("tool_calls") and any(call["function"]["name"] in text or call["id"] in text for call in given["tool_calls"]):
            assert answer is None
        elif given["content"]:
            assert answer is not None and answer["content"].strip() == given["content"].strip()
            assert answer.get("reasoning_content", "").strip() == given.get("reasoning_content", "").strip()


class Target:
    """Answers a prompt in the same way whenever it is asked: words, thinking, calls, cut short, ended otherwise."""

    def __init__(self, name: str) -> None:
        self.name, self.said, self.answers = name, dict[tuple[int, ...], list[int]](), list[list[int]]()
        for words in TEXTS:
            for more in ({}, {"reasoning_content": "it is a dog"}, {"tool_calls": [CALL]}, {"tool_calls": [CALL], "reasoning_content": "hm"}):
                message: Message = {"role": "assistant", "content": "" if "tool_calls" in more else words, **more}
                shown = renderer(name).shown(Conversation(({"role": "user", "content": "x"}, message), TOOLS))
                self.answers += [generated(name, shown)] if shown is not None else []
        for text in ("<think>\n\n</think>\n\nso", "<think>\nnever ends", "<think>hm</think>", "</think>so"):
            self.answers.append(tokenizer(name)(text + FAMILIES[name].ends[0], add_special_tokens=False)["input_ids"])

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        for index, prompt in enumerate(prompts):
            chance = random.Random(str((self.name, list(prompt))))
            ids, finish = chance.choice(self.answers), "stop"
            if chance.random() < 0.1:
                ids, finish = ids[: chance.randrange(len(ids)) or 1], "length"
            elif chance.random() < 0.2:
                ids = [*ids[:-1], tokenizer(self.name).convert_tokens_to_ids(chance.choice(FAMILIES[self.name].ends))]
            self.said[tuple(prompt)] = ids
            yield Answer(index, ids, finish)

    def close(self) -> None: ...


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_regenerated_alike_in_any_order_and_from_any_row_on(name: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for seed in range(6):
        one = conversation(random.Random(seed))
        upto = max(i for i, message in enumerate(one.messages) if message["role"] == "user") + 1 if seed % 3 == 0 else None
        rows.append({"id": str(seed), "messages": one.messages[:upto], **({"tools": one.tools} if one.tools else {})})
    target, opened = Target(name), {"enable_thinking": True, "thinking": True} if len(name) % 2 else None

    def answer(order: Sequence[dict[str, Any]], group: int, output: str) -> list[bytes]:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        answerer = EngineAnswerer(target, families.renderer(name, variables=opened) if opened else renderer(name), renderer(name))
        answer_file(answerer, {"target": name}, input=str(tmp_path / "in.jsonl"), output=tmp_path / output, sampling=Sampling(99), group=group)
        return (tmp_path / output).read_bytes().splitlines(keepends=True)

    whole = answer(rows, 1, "whole.jsonl")
    assert sorted(answer(rows[::-1], 4, "other.jsonl")) == sorted(whole)
    for stopped in range(len(whole)):
        (tmp_path / "some.jsonl").write_bytes(b"".join(whole[:stopped]) + whole[stopped][: len(whole[stopped]) // 2])
        assert answer(rows, 1, "some.jsonl") == whole

    for line in whole:
        row, made = json.loads(line), Tokenise(renderer(name), max_length=9999, messages_key=None, media="refuse").row(line, 0)
        ids, want = made.ids.tolist(), np.zeros_like(made.mask)
        for prompt, said in target.said.items():
            if ids[: len(prompt) + len(said)] == [*prompt, *said]:
                want[len(prompt) : len(prompt) + len(said)] = 1
        given = any(message.get("tool_calls") for message in row.get("conversations", ()))
        assert made.problem == "" and want.any() and (np.array_equal(made.mask, want) or (given and (made.mask >= want).all()))
