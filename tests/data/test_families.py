"""Every family's format: what is supervised, decoded, is exactly the assistant's words and the end token, after exactly what serving would have sent."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.data.families import CASES, FAMILIES, FOLDER, HERMES, TOOLS, answer, renderer, supervised, tokenizer, user
from torchspec.data.conversations import Conversation, Message, RowError
from torchspec.data.tokenise import Tokenise
from torchspec.errors import UserError

GOLDEN = json.loads((FOLDER / "golden.json").read_text())
EVERY = [(name, case) for name in FAMILIES for case in CASES]


@pytest.mark.parametrize(("name", "case"), EVERY)
def test_what_is_supervised(name: str, case: str) -> None:
    expected = FAMILIES[name].expected[case]
    if expected is None:
        with pytest.raises(RowError, match="shows no answer as the target generates it"):
            renderer(name).render(CASES[case])
        return
    rendered = renderer(name).render(CASES[case])
    assert supervised(tokenizer(name), rendered) == expected
    assert rendered.ids.tolist() == GOLDEN[name][case]["ids"]
    runs = np.flatnonzero(np.diff(np.concatenate([[0], rendered.mask, [0]])))
    assert runs.tolist() == GOLDEN[name][case]["mask"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_answer_follows_what_serving_sends(name: str) -> None:
    for case, conversation in CASES.items():
        if not FAMILIES[name].expected[case]:
            continue
        found = renderer(name)
        rendered = found.render(conversation)
        sent = found.template.text(conversation.messages[:-1], conversation.tools, generate=True, variables=found.template.variables(conversation))
        ids = tokenizer(name)(sent, add_special_tokens=False)["input_ids"]
        begin = int(np.flatnonzero(np.diff(np.concatenate([[0], rendered.mask])) == 1)[-1])
        assert rendered.ids[:begin].tolist() == ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_keeps_whole_tokens_and_their_mask(name: str) -> None:
    case = "thinking" if FAMILIES[name].expected["turns"] is None else "turns"
    whole = renderer(name).render(CASES[case])
    shown = np.flatnonzero(whole.mask)
    for limit in (2, int(shown[0]), int(shown[0]) + 1, int(shown[-1]), len(whole.ids) + 5):  # in the header, before, in, at the end of an answer, nowhere
        made = Tokenise(renderer(name), max_length=limit, messages_key=None, media="refuse")(
            {"row": [json.dumps({"messages": CASES[case].messages}).encode()], "source": [0]}
        )
        assert made["problem"] == [""] and made["length"] == [len(whole.ids)]
        assert made["ids"][0].tolist() == whole.ids[:limit].tolist() and made["mask"][0].tolist() == whole.mask[:limit].tolist()


def test_supervise_last_and_all() -> None:
    for name in ("qwen3", "qwen2.5", "gpt-oss", "glm-4.5", "kimi-k2.5"):
        last = supervised(tokenizer(name), renderer(name, supervise="last").render(CASES["thinking"]))
        auto = supervised(tokenizer(name), renderer(name).render(CASES["thinking"]))
        assert last == auto[-1:]
    for name, first in {
        "qwen3": "two three<|im_end|>",
        "kimi-k2.5": "two three<|im_end|>",
        "minimax-m2": "two three[e~[",
        "gpt-oss": "two three",  # <|end|> is not what the target ends an answer with
        "glm-4.5": "two three<|user|>",
        "deepseek-v3.2": "two three<｜end▁of▁sentence｜>",
        "gemma-4": "two three<turn|>",
    }.items():
        every = supervised(tokenizer(name), renderer(name, supervise="all").render(CASES["thinking"]))
        assert every == [first, *(FAMILIES[name].expected["thinking"] or [])], name
    with pytest.raises(UserError, match=r"data\.supervise='some' is unknown"):
        renderer("qwen3", supervise="some")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.expected["turns"] is not None])
def test_text_rendered_elsewhere(name: str) -> None:
    """Every answer that such a text shows is supervised; where messages give the same, ids and mask are the same."""
    found = renderer(name)
    conversation = CASES["turns"]
    text = found.template.text(conversation.messages, None, generate=False, variables=found.template.variables(Conversation()))
    rendered = found.render(Conversation(text=text))
    words = supervised(tokenizer(name), rendered)
    assert len(words) == 2 and "two three" in words[0] and "because it is" in words[1]
    if name not in ("qwen3", "glm-4.5", "deepseek-v3.2", "kimi-k2.5", "gpt-oss", "gemma-4"):  # there thinking or the end depend on what messages say
        again = found.render(conversation)
        assert rendered.ids.tolist() == again.ids.tolist() and rendered.mask.tolist() == again.mask.tolist()
    with pytest.raises(RowError, match="text has no answer|text does not begin with"):
        found.render(Conversation(text="only words"))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (answer("", "it is a"), "<think>\nit is a"),
        (answer("<think>it is</think>"), "<think>\nit is"),
        (answer("<think>it is</think>two"), "<think>\nit is\n</think>\n\ntwo"),
        (answer("im"), "<think>\n\n</think>\n\nim"),
        (answer("", "we call", call=True), f"<think>\nwe call\n</think>\n\n{HERMES}"),
    ],
)
def test_what_is_supervised_of_an_answer_that_was_cut(message: Message, shown: str) -> None:
    one = Conversation(messages=(user("the cat"), message), tools=TOOLS, cut=frozenset({1}))
    assert supervised(tokenizer("qwen3"), renderer("qwen3", variables={"enable_thinking": True}).render(one)) == [shown]


@pytest.mark.parametrize("thought", ["over", "runs over", "it runs over it"])
def test_thinking_that_is_in_the_words_as_well_is_thinking(thought: str) -> None:
    one = Conversation(messages=(user("the cat"), answer("runs over", thought)))
    for name, shown in (("gemma-4", f"<|channel>thought\n{thought}<channel|>runs over<turn|>"), ("kimi-k2.5", f"{thought}</think>runs over<|im_end|>")):
        assert supervised(tokenizer(name), renderer(name).render(one)) == [shown]


def test_the_switch_for_thinking_can_be_set() -> None:
    on = renderer("qwen3", variables={"enable_thinking": True})
    assert supervised(tokenizer("qwen3"), on.render(CASES["single"])) == ["<think>\n\n</think>\n\nruns over<|im_end|>"]
    assert "/nothink" in tokenizer("glm-4.5").decode(renderer("glm-4.5").render(CASES["single"]).ids.tolist())


def test_parts_reach_templates_that_take_them() -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "image"}, {"type": "text", "text": "cat"}]
    conversation = replace(CASES["single"], messages=({"role": "user", "content": parts}, CASES["single"].messages[1]))
    assert "the<start_of_image>cat" in tokenizer("gemma-3").decode(renderer("gemma-3").render(conversation).ids.tolist())
    with pytest.raises(RowError, match="part of type 'image', and the target's chat template takes text alone"):
        renderer("qwen2.5").render(conversation)
    words = replace(conversation, messages=({"role": "user", "content": [parts[0], parts[2]]}, CASES["single"].messages[1]))
    assert "the\ncat" in tokenizer("qwen2.5").decode(renderer("qwen2.5").render(words).ids.tolist())
