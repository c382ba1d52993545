"""What a row says beside its messages, and of each of them, is obeyed, refused or named: in every form that public data sets have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torchspec.data.conversations import Conversation, RowError, parse
from torchspec.data.unused import Unused

USER, SAY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
BARE = TOOL["function"]


def parsed(row: dict[str, Any], **options: Any) -> Conversation:
    return parse(json.dumps(row).encode(), **options)


def refused(row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(RowError) as caught:
        parsed(row, **options)
    return str(caught.value)


# -- where messages stand

FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sharegpt": ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, [USER, SAY]),
    "sharegpt with another's spelling": ({"conversations": [{"from": "Human", "value": "u"}, {"from": "ChatGPT", "value": "a"}]}, [USER, SAY]),
    "sharegpt with both keys in a column": (
        {"conversations": [{"from": None, "role": "user", "value": None, "content": "u"}, {"from": "gpt", "role": None, "value": "a", "content": None}]},
        [USER, SAY],
    ),
    "role and value": ({"messages": [{"role": "user", "value": "u"}, {"role": "assistant", "text": "a"}]}, [USER, SAY]),
    "gemma's role": ({"messages": [USER, {"role": "model", "content": "a"}]}, [USER, SAY]),
    "a list of objects as older datasets keep it": ({"conversations": {"from": ["human", "gpt"], "value": ["u", "a"], "weight": None}}, [USER, SAY]),
    "a prompt's messages and its answer": ({"messages": [SYSTEM, USER], "response": "a", "prompt": "u"}, [SYSTEM, USER, SAY]),
    "messages of both": ({"messages": [USER], "completion": [SAY]}, [USER, SAY]),
    "lmsys": ({"conversation_id": "x", "conversation": [USER, SAY], "turn": 1, "language": "English"}, [USER, SAY]),
    "two columns of the same": ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "messages": [USER, SAY]}, [USER, SAY]),
    "an empty second column": ({"conversations": [], "messages": [USER, SAY]}, [USER, SAY]),
    "a column of that name that is a number": ({"conversations": [USER, SAY], "messages": 2}, [USER, SAY]),
    "messages as JSON strings": ({"messages": [json.dumps(USER), json.dumps(SAY)]}, [USER, SAY]),
    "ultrachat": ({"prompt": "u", "prompt_id": "x", "messages": [USER, SAY, USER, SAY]}, [USER, SAY, USER, SAY]),
    "alpaca": ({"instruction": "u", "input": "", "output": "a"}, [USER, SAY]),
    "alpaca with input": ({"instruction": "u", "input": "more", "output": "a"}, [{"role": "user", "content": "u\nmore"}, SAY]),
    "alpaca with the text that it was made to": ({"instruction": "u", "input": "", "output": "a", "text": "Below is an instruction"}, [USER, SAY]),
    "llama-factory alpaca": (
        {"instruction": "u", "input": "", "output": "a", "system": "s", "history": [["q", "b"]]},
        [SYSTEM, {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}, USER, SAY],
    ),
    "ms-swift": ({"query": "u", "response": "a", "history": []}, [USER, SAY]),
    "openorca": ({"id": "1", "system_prompt": "s", "question": "u", "response": "a"}, [SYSTEM, USER, SAY]),
    "openorca without a system prompt": ({"system_prompt": "", "question": "u", "response": "a"}, [USER, SAY]),
    "gsm8k": ({"question": "u", "answer": "a"}, [USER, SAY]),
    "prompt and completion": ({"prompt": "u", "completion": "a"}, [USER, SAY]),
    "trl": ({"prompt": [SYSTEM, USER], "completion": [SAY]}, [SYSTEM, USER, SAY]),
    "nemotron": ({"input": [USER], "output": "a", "system_prompt": "s", "category": "math"}, [SYSTEM, USER, SAY]),
    "pairs": ({"system": "s", "conversation": [{"human": "u", "assistant": "a"}] * 2}, [SYSTEM, USER, SAY, USER, SAY]),
    "cohere": ({"messages": [{"role": "User", "content": "u"}, {"role": "Chatbot", "content": "a"}]}, [USER, SAY]),
    "an empty list of messages beside a question": ({"messages": [], "prompt": "u", "response": "a"}, [USER, SAY]),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, USER, SAY]}, [{"role": "developer", "content": "s"}, USER, SAY]),
}


@pytest.mark.parametrize("form", FORMS)
def test_messages_of_public_forms(form: str) -> None:
    row, messages = FORMS[form]
    assert parsed(row).messages == tuple(messages)
    asked = parsed(row, need_answer=False)  # regenerate and acceptance read the same
    assert asked.messages == tuple(messages) and asked.columns == parsed(row).columns


def test_prompt_beside_messages_is_not_read_and_named_where_it_says_something_else() -> None:
    for need_answer in (True, False):
        same = parsed({"prompt": "u ", "messages": [SYSTEM, USER, SAY, USER, SAY]}, need_answer=need_answer)
        assert len(same.messages) == 5 and not same.unused
        other = parsed({"prompt": "v", "completion": "b", "messages": [USER, SAY]}, need_answer=need_answer)
        assert other.messages == (USER, SAY) and set(other.unused) == {"prompt", "completion"}
    assert not parsed({"prompt": [SYSTEM, USER], "completion": [SAY], "messages": [SYSTEM, USER, SAY]}).unused
    assert not parsed({"prompt": "u", "response": "a", "messages": [USER, SAY]}).unused


def test_questions_alone_are_prompts() -> None:
    for row in ({"prompt": "u"}, {"instruction": "u", "input": ""}, {"prompt": [USER]}, {"messages": [USER]}, {"question": "u"}):
        assert parsed(row, need_answer=False).messages == (USER,)
        assert "has no" in refused(row)
    for row in ({"instruction": "u", "output": None}, {"question": "u", "answer": 42}, {"prompt": "u", "response": ["a"]}):
        assert f"has no answer to its {next(iter(row))}: text or messages in completion or" in refused(row)
    with_choice = parsed({"prompt": "u", "chosen": "a", "rejected": "b"}, need_answer=False)
    assert with_choice.messages == (USER,) and with_choice.unused == ("chosen", "rejected")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [USER, SAY], "messages": [USER, {**SAY, "content": "b"}]}, "has conversations and messages, which differ: name one with"),
        ({"prompt": "u", "instruction": "v", "output": "a"}, r"two different questions (prompt, instruction)"),
        ({"prompt": "u", "response": "a", "output": "b"}, "two different answers (response, output)"),
        ({"prompt": "u", "chosen": [USER, SAY], "rejected": [USER, SAY]}, "has chosen or rejected answers and none that is said to be trained"),
        ({"messages": [USER], "response": "a", "output": "b"}, "messages without an answer, and two different answers (response, output)"),
        ({"conversations": {"from": ["human", "gpt"], "value": ["u"]}}, "conversations is an object, not a list of messages"),
        ({"instruction": "u", "input": [USER], "output": "a"}, "an instruction and an input that are not both text"),
        ({"instruction": "u", "output": "a", "history": "q"}, "history is not a list of pairs"),
        ({"messages": [{"role": "user", "content": "u", "value": "v"}, SAY]}, "message 0 has content and value, which differ"),
        ({"messages": [{"from": "gpt", "value": None}, SAY]}, "message 0: its content is missing"),
        ({"conversation": "u: hello"}, "has no conversations or messages (keys: conversation)"),
        ({"contents": [{"role": "user", "parts": [{"text": "u"}]}]}, "has no conversations or messages (keys: contents)"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(row: dict[str, Any], said: str) -> None:
    assert said in refused(row)


def test_a_key_twice_in_one_object_is_refused() -> None:
    with pytest.raises(RowError, match="says 'messages' twice"):
        parse(b'{"messages": [], "messages": [1]}')


def test_messages_key_names_an_answer_as_well() -> None:
    for chosen in ([USER, SAY], [SAY], "a"):
        row = {"prompt": "u", "chosen": chosen, "rejected": "b"}
        found = parsed(row, messages_key="chosen")
        assert found.messages == (USER, SAY) and "rejected" in found.unused
    assert parsed({"system": "s", "dialog": [USER, SAY], "messages": [USER]}, messages_key="dialog").unused == ("messages",)


# -- beside the messages


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message", "system_instruction"])
def test_a_system_column_begins_the_conversation(key: str) -> None:
    for value in ("s", [{"type": "text", "text": "s"}]):
        found = parsed({key: value, "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a", "finish": "length"}]})
        assert found.messages == (SYSTEM, USER, SAY) and not found.unused and found.cut == {2} and key in found.columns
    assert parsed({key: "s", "messages": [SYSTEM, USER, SAY]}).messages == (SYSTEM, USER, SAY)
    assert parsed({key: "s", "prompt": "u"}, need_answer=False).messages == (SYSTEM, USER)
    assert parsed({key: None, "messages": [USER, SAY]}).messages == (USER, SAY) == parsed({key: "", "messages": [USER, SAY]}).messages
    developer = {"role": "developer", "content": "s"}
    assert parsed({key: "s", "messages": [developer, USER, SAY]}).messages == (developer, USER, SAY)
    assert parsed({key: "t", "messages": [developer, USER, SAY]}).messages == ({"role": "system", "content": "t"}, developer, USER, SAY)
    assert "two system prompts" in refused({key: "other", "messages": [SYSTEM, USER, SAY]})
    assert "content is a int" in refused({key: 3, "messages": [USER, SAY]})
    assert parsed({key: "s", "text": "rendered"}).unused == (key,)


def test_two_system_columns() -> None:
    assert parsed({"system": "s", "system_prompt": "s", "messages": [USER, SAY]}).messages == (SYSTEM, USER, SAY)
    assert "system and system_prompt, which differ" in refused({"system": "s", "system_prompt": "t", "messages": [USER, SAY]})


def test_what_a_row_tells_the_template() -> None:
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert parsed({"messages": [USER, SAY], "chat_template_kwargs": value}).template_args == {"enable_thinking": False}
    assert parsed({"messages": [USER, SAY], "enable_thinking": False}).template_args == {"enable_thinking": False}
    assert parsed({"messages": [USER, SAY], "enable_thinking": "yes"}).unused == ("enable_thinking",)
    found = parsed({"messages": [USER, SAY], "thinking": True, "reasoning_effort": "high"})
    assert found.template_args == {"thinking": True, "reasoning_effort": "high"} and not found.unused
    assert parsed({"messages": [USER, SAY], "thinking": "hm"}).unused == ("thinking",)
    assert "which differ" in refused({"messages": [USER, SAY], "enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}})
    assert "sets add_generation_prompt" in refused({"messages": [USER, SAY], "chat_template_kwargs": {"add_generation_prompt": True}})
    assert "is a list, not an object" in refused({"messages": [USER, SAY], "chat_template_kwargs": [1]})


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [BARE]},
        {"functions": [BARE]},
        {"functions": json.dumps([BARE])},
        {"tools": [TOOL], "functions": [BARE]},
        {"tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}]},
    ],
)
def test_tools_in_every_form(row: dict[str, Any]) -> None:
    found = parsed({**row, "messages": [USER, SAY]})
    assert found.tools == [TOOL] and not found.unused


def test_tools_that_contradict_each_other() -> None:
    assert "has tools and functions, which differ" in refused({"messages": [USER, SAY], "tools": [TOOL], "functions": [{**BARE, "name": "g"}]})
    assert parsed({"messages": [USER, SAY], "tools": "", "functions": []}).tools is None


CALLS: dict[str, list[dict[str, Any]]] = {
    "tool_calls": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "name": "f", "content": "r"}],
    "function_call": [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "r"},
    ],
    "both": [
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": {"x": 1}}, "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "content": "r"},
    ],
    "llama-factory": [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, {"from": "observation", "value": "r", "name": "f"}],
    "ms-swift": [{"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}, {"role": "tool_response", "content": "r", "name": "f"}],
    "parameters for arguments": [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
        {"role": "ipython", "content": "r", "name": "f"},
    ],
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_and_results_in_every_form(form: str) -> None:
    found = parsed({"messages": [USER, *CALLS[form], SAY]})
    assert found.messages == (USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "r", "name": "f"}, SAY)
    assert not found.unused


def test_anthropic_blocks() -> None:
    said = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}},
    ]
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}]}
    row = {"system": "s", "messages": [USER, {"role": "assistant", "content": said}, {"role": "user", "content": [result, {"type": "text", "text": "u"}]}, SAY]}
    assert parsed(row).messages == (
        SYSTEM, USER, {"role": "assistant", "content": "a", "tool_calls": [{"id": "c", **CALL}], "reasoning_content": "hm"},
        {"role": "tool", "content": "r", "tool_call_id": "c"}, USER, SAY,
    )  # fmt: skip


def test_results_that_are_objects_and_parts_that_are_text() -> None:
    found = parsed({"messages": [{"role": "user", "content": ["u"]}, *CALLS["tool_calls"][:1], {"role": "tool", "content": {"é": [1, None]}}, SAY]})
    assert found.messages[0] == USER and found.messages[2] == {"role": "tool", "content": '{"é": [1, null]}'}
    assert parsed({"messages": [{"role": "user", "content": {"type": "text", "text": "u"}}, {**SAY, "content": [{"text": "a"}]}]}).messages == (USER, SAY)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**SAY, "function_call": {"arguments": "{}"}}, "a tool call has no function name"),
        ({**SAY, "function_call": "f(x)"}, "function_call is no valid JSON"),
        ({"from": "function_call", "value": "weather in Paris"}, "content is no valid JSON"),
        ({**SAY, "tool_calls": [CALL], "function_call": {"name": "g", "arguments": {}}}, "tool_calls and function_call, which differ"),
        ({**SAY, "reasoning_content": "x", "thinking": "y"}, "two different texts of reasoning"),
        ({**SAY, "content": [{"type": "thinking", "thinking": 3}]}, "a part of type 'thinking' without text"),
    ],
)
def test_calls_that_cannot_be_read(message: dict[str, Any], said: str) -> None:
    assert said in refused({"messages": [USER, message]})


# -- marks


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "training", "loss_mask", "loss"])
def test_message_weights_say_what_is_context_only(key: str) -> None:
    for off, on in ((0, 1), (False, True), (0.0, 1.0)):
        found = parsed({"messages": [USER, {**SAY, key: off}, USER, {**SAY, key: on}, USER, {**SAY, key: None}, USER, SAY]})
        assert found.context == {1} and not found.unused and all(key not in message for message in found.messages)
    assert parsed({"system": "s", "messages": [USER, {**SAY, key: 0}]}).context == {2}
    for value in (0.5, 2, -1, "0", [0, 1], {}):
        assert f"message 1: its {key} is {value!r}; an answer is trained" in refused({"messages": [USER, {**SAY, key: value}]})
    assert not parsed({"messages": [{**USER, key: 0}, SAY]}).unused  # a question is not trained, as it says
    assert parsed({"messages": [{**USER, key: 1}, SAY]}).unused == (f"messages[].{key}",)


def test_marks_that_contradict_each_other_or_cannot_be_obeyed() -> None:
    assert "weight and train say different things" in refused({"messages": [USER, {**SAY, "weight": 0, "train": True}]})
    assert "its train_detail cannot be obeyed" in refused({"messages": [USER, {**SAY, "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}]})
    assert not parsed({"messages": [USER, {**SAY, "train_detail": None}]}).unused


# -- what is not used


def test_keys_that_are_not_used_are_named() -> None:
    row = {
        "id": "1", "source": "x", "score": 0, "empty": None, "none": [], "parallel_tool_calls": False, "weight": 0.5, "sampling": {}, "finish": "stop",
        "messages": [
            {**USER, "mood": "good", "tool_calls": [CALL], "thinking": "x"},
            {**SAY, "mood": "bad", "refusal": None, "tool_calls": [{**CALL, "index": 0}]},
        ],
    }  # fmt: skip
    found = parsed(row).unused
    assert set(found) == {
        "id", "source", "score", "parallel_tool_calls", "weight",
        "messages[].mood", "messages[].tool_calls", "messages[].thinking", "messages[].tool_calls[].index",
    }  # fmt: skip
    nested = {"metadata": {"system": "s", "n": 1}, "extra_body": {"chat_template_kwargs": {"x": 1}}, "messages": [USER, SAY]}
    assert set(parsed(nested).unused) == {"metadata", "metadata.system", "extra_body", "extra_body.chat_template_kwargs"}
    parts = [{"type": "text", "text": "u", "cache_control": {"type": "ephemeral"}}]
    assert parsed({"messages": [{"role": "user", "content": parts}, SAY], "images": ["a.png"]}).unused == ("images", "messages[].content[].cache_control")
    assert parsed({"input_ids": [1], "loss_mask": [1], "messages": [USER], "tools": [TOOL], "mood": 1, "tokenizer": "x"}).unused == ("mood",)


def test_null_arguments_of_json_are_named() -> None:
    """``Dataset.to_json`` writes the nulls that a column put into a row; in text they are meant."""
    padded = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "n": None, "m": {"y": None}}}}]}
    meant = {"role": "assistant", "content": "", "tool_calls": ['{"name": "f", "arguments": "{\\"n\\": null}"}']}
    given = {**BARE, "parameters": {"type": "object", "properties": {"x": {"type": "integer", "default": None}, "n": None}}}
    row = parsed({"messages": [USER, padded, {"role": "tool", "content": "1"}, SAY], "tools": given})
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "n": None, "m": {"y": None}}
    assert row.unused == ("messages[].tool_calls[].arguments.n: null", "messages[].tool_calls[].arguments.m.y: null")
    assert row.tools is not None and row.tools[0]["function"]["parameters"]["properties"] == {"x": {"type": "integer", "default": None}}
    assert not parsed({"messages": [USER, meant, {"role": "tool", "content": "1"}, SAY]}).unused
    counted = Unused()
    counted.add("a", row.unused)
    (line,) = counted.lines("data.train")
    assert "arguments that are null are kept, and trained" in line and "arguments.n (1 row)" in line and "not used" not in line


def test_tokens_with_labels_and_padding() -> None:
    assert parsed({"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1]}).loss_mask == [0, 1]
    assert "labels is not input_ids" in refused({"input_ids": [5, 6], "labels": [-100, 7]})
    assert "leave out the padding" in refused({"input_ids": [5, 6], "loss_mask": [0, 1], "attention_mask": [1, 0]})


def test_finish_reason_is_finish() -> None:
    assert parsed({"messages": [USER, SAY], "finish_reason": "length"}).cut == {1} == parsed({"messages": [USER, {**SAY, "finish_reason": "length"}]}).cut
    assert parsed({"messages": [USER, SAY], "finish_reason": "stop"}).cut == set()
