"""Whatever a target of any family says, training on the regenerated row supervises exactly the ids that it generated, behind the prompt that it was sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import families
from tests.data.families import CASES, FAMILIES, RESULT, TOOLS, answer, tokenizer, user
from torchspec.data.conversations import Conversation
from torchspec.data.exact_ids import ExactRows
from torchspec.data.generators import EngineAnswerer
from torchspec.data.regenerate import RegenerateReport, answer_file
from torchspec.data.render import Renderer
from torchspec.data.tokenise import Tokenise
from torchspec.engines.engine import Answer, Sampling


@cache
def renderer(name: str) -> Renderer:
    return families.renderer(name)


class Says:
    """Gives the answers it was made with, one after the other."""

    def __init__(self, answers: list[tuple[list[int], str]]) -> None:
        self.answers, self.sent = list(answers), list[list[int]]()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        for index, prompt in enumerate(prompts):
            self.sent.append(list(prompt))
            ids, finish = self.answers.pop(0)
            yield Answer(index, ids, finish)

    def close(self) -> None: ...


def run(
    name: str, folder: Path, row: dict[str, Any], answers: list[tuple[list[int], str]], variables: dict[str, Any] | None = None
) -> tuple[RegenerateReport, dict[str, Any], Says, np.ndarray, np.ndarray]:
    """(report, the row written, what was asked, ids and mask that training makes of the row)."""
    (folder / "in.jsonl").write_text(json.dumps({"id": "a", **row}) + "\n")
    says, sampling = Says(answers), Sampling(99)
    answerer = EngineAnswerer(says, families.renderer(name, variables=variables) if variables else renderer(name), renderer(name))
    report = answer_file(answerer, {"target": name}, input=str(folder / "in.jsonl"), output=folder / "out.jsonl", sampling=sampling)
    (line,) = (folder / "out.jsonl").read_bytes().splitlines()
    made = Tokenise(renderer(name), max_length=9999, messages_key=None, media="refuse").row(line, 0)
    assert made.problem == ""
    return report, json.loads(line), says, made.ids, made.mask


def check(says: Says, generated: list[int], ids: np.ndarray, mask: np.ndarray) -> None:
    """The last answer, and nothing else of a conversation of one."""
    begin = len(says.sent[-1])
    assert ids[:begin].tolist() == says.sent[-1]
    assert ids[begin : begin + len(generated)].tolist() == generated
    assert np.flatnonzero(mask).tolist() == list(range(begin, begin + len(generated)))


def generated(name: str, shown: str) -> list[int]:
    """Ids of an answer up to its end token: templates put more behind it."""
    ids = tokenizer(name)(shown, add_special_tokens=False)["input_ids"]
    end = next((i for i, token in enumerate(ids) if renderer(name).ends(token)), None)
    return [*ids, tokenizer(name).convert_tokens_to_ids(FAMILIES[name].ends[-1])] if end is None else ids[: end + 1]


WHAT = {
    "words": Conversation(messages=(user("one"), answer("two three"))),
    "thinking": Conversation(messages=(user("one"), answer("two three", "it is a dog"))),
    "call": Conversation(messages=CASES["tools"].messages[:2], tools=TOOLS),
    "thinking call": Conversation(messages=CASES["thinking tools"].messages[:2], tools=TOOLS),
    "tools, words": Conversation(messages=(user("one"), answer("two three")), tools=TOOLS),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_answer_of_every_family(name: str, tmp_path: Path) -> None:
    ends = [tokenizer(name).convert_tokens_to_ids(end) for end in FAMILIES[name].ends]
    tried = 0
    for what, conversation in WHAT.items():
        shown = renderer(name).shown(conversation)
        if shown is None:
            continue  # the family has no such answer
        said = generated(name, shown)
        row = {"messages": [conversation.messages[0]], **({"tools": TOOLS} if conversation.tools else {})}
        letters = [i for word in ("t", "w", "o") for i in tokenizer(name)(word, add_special_tokens=False)["input_ids"]]
        for number, (ids, finish) in enumerate(
            [
                (said, "stop"),
                *([([*said[:-1], end], "stop") for end in ends]),  # another end token than the template shows
                (said[: len(said) // 2 + 1], "length"),
                (said[:-1], "length"),
                ([*letters, said[-1]], "stop"),  # the target need not write words as the tokenizer cuts them
                ([*said[:-1], tokenizer(name).convert_tokens_to_ids("Ã"), *said[-1:]], "stop"),  # half a character
            ]
        ):
            folder = tmp_path / f"{what}{number}"
            folder.mkdir()
            _, written, says, made, mask = run(name, folder, row, [(ids, finish)])
            check(says, ids, made, mask)
            assert written["finish"] == finish
            tried += 1
    assert tried >= 6


@pytest.mark.parametrize("name", FAMILIES)
def test_thinking_is_told_from_words_and_history_has_what_serving_sends(name: str, tmp_path: Path) -> None:
    thinks = renderer(name).shown(WHAT["thinking"])
    again = Conversation(messages=(*WHAT["thinking"].messages, user("why"), answer("because it is", "where is it")))
    shown = [generated(name, text or "") for text in (thinks, renderer(name).shown(again))]
    prompt = renderer(name).prompt(Conversation(messages=again.messages[:3]), 3)
    _, written, says, ids, mask = run(name, tmp_path, {"messages": again.messages}, [(one, "stop") for one in shown])
    assert says.sent[1] == prompt  # with the first answer as a server would have taken it apart
    assert [m["role"] for m in written["conversations"]] == ["user", "assistant", "user", "assistant"]
    assert written["conversations"][3] in (answer("because it is", "where is it"), answer("<think>\nwhere is it\n</think>\n\nbecause it is"))
    begin = len(says.sent[1])
    assert ids[:begin].tolist() == says.sent[1] and ids[begin : begin + len(shown[1])].tolist() == shown[1]
    assert mask[begin : begin + len(shown[1])].all() and not mask[begin + len(shown[1]) :].any()
    first = says.sent[0] + shown[0]  # supervised where, and only where, it is still there as it was generated
    kept = ids[: len(first)].tolist() == first
    assert np.flatnonzero(mask[:begin]).tolist() == (list(range(len(says.sent[0]), len(first))) if kept else [])


def test_rows_that_messages_say_right_stay_messages_and_others_say_their_tokenizer(tmp_path: Path) -> None:
    said = tokenizer("qwen2.5")("two three<|im_end|>", add_special_tokens=False)["input_ids"]
    report, written, *_ = run("qwen2.5", tmp_path, {"messages": [user("one")]}, [(said, "stop")])
    assert report.exact == 0 and "input_ids" not in written and written["conversations"][1] == answer("two three")
    (tmp_path / "out.jsonl").unlink()
    report, written, *_ = run("qwen3", tmp_path, {"messages": [user("one")]}, [(said, "stop")], {"enable_thinking": True})
    assert report.exact == 1 and written["conversations"][1] == answer("two three") and written["input_ids"]  # training would close the thinking before it
    other = Tokenise(renderer("phi-4"), max_length=99, messages_key=None, media="refuse").row(json.dumps(written).encode(), 0)
    assert "tokens of another tokenizer" in other.problem


def test_an_answer_that_calls_ends_its_conversation(tmp_path: Path) -> None:
    for name in ("qwen2.5", "kimi-k2", "gpt-oss"):
        (tmp_path / name).mkdir()
        ids = generated(name, renderer(name).shown(WHAT["call"]) or "")
        _, _, says, _, _ = run(name, tmp_path / name, {"messages": [user("where is it"), answer("x"), user("why")], "tools": TOOLS}, [(ids, "stop")])
        assert len(says.sent) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_is_no_words_whatever_came_before(name: str) -> None:
    before = {
        "question": (user("one"),),
        "call": (user("one"), answer("", call=True), RESULT),
        "thinking call": (user("one"), answer("", "hm", call=True), RESULT),
    }
    for what, messages in before.items():
        for thought in (None, "we look"):
            shown = renderer(name).shown(Conversation((*messages, answer("", thought, call=True)), TOOLS))
            if shown is not None:
                assert ExactRows(renderer(name)).message(Conversation(messages, TOOLS), generated(name, shown), cut=False) is None, what


def test_a_row_without_shapes_leaves_the_next_ones_theirs() -> None:
    rows, said = ExactRows(renderer("phi-3")), generated("phi-3", renderer("phi-3").shown(WHAT["thinking"]) or "")
    picture = {"role": "user", "content": [{"type": "image"}]}
    assert rows.message(Conversation((picture,)), said, cut=False) is None  # the template takes text alone
    assert rows.message(Conversation((user("one"),)), said, cut=False) == WHAT["thinking"].messages[1]


@pytest.mark.parametrize("name", ["qwen3", "glm-4.5", "deepseek-v3", "gpt-oss"])
def test_thinking_that_ends_in_another_way_is_thinking_still(name: str) -> None:
    end = FAMILIES[name].ends[0]
    opened = {"glm-4.5": "\n<think>hm", "gpt-oss": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"}.get(
        name, "<think>\nhm\n"
    )
    close = "" if name == "gpt-oss" else "</think>"
    for after, words in (("", ""), ("\n", ""), (" so it is", "so it is")):
        ids = tokenizer(name)(opened + close + after + end, add_special_tokens=False)["input_ids"]
        message = ExactRows(renderer(name)).message(Conversation((user("one"),)), ids, cut=False)
        assert message is not None and (message["content"].strip(), message["reasoning_content"]) == (words, "hm"), after
