"""Rows that no one foresaw: whatever a file holds, a row is a conversation or a bad row, and no run ends in a traceback over one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.data.families import renderer
from tests.data.test_mistakes import corpus
from tests.tiny import save_target
from torchspec.data.conversations import RowError, parse
from torchspec.data.render import Renderer
from torchspec.data.sources import find_sources, read_rows
from torchspec.data.tokenise import Tokenise
from torchspec.errors import UserError

ASK, SAY = {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "runs"}


def call(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}, **changes}]}


ODD = {
    r'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so \ud83d"}]}': r"lone surrogate '\ud83d'",
    r'{"text": "<|im_start|>assistant\nso \uDE00<|im_end|>"}': r"lone surrogate '\ude00'",
    json.dumps({"messages": [ASK, {**SAY, "tool_calls": json.dumps([{"function": {"name": "f", "arguments": {"x": "\ud83d"}}}])}]}): r"'\ud83d'",
    json.dumps({"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]}): "message 0 has the unknown role ['human']",
    json.dumps({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}, SAY]}): "a part of type ['text']",
    json.dumps({"messages": [ASK, call(id=7)]}): "a tool call has an id that is a int, not text",
    json.dumps({"messages": [ASK, call(function={"name": "f", "arguments": 5})]}): "arguments of f are a int, not an object",
    json.dumps({"messages": [ASK, call(), {"role": "tool", "content": "x", "tool_call_id": 7}, SAY]}): "message 2: its tool_call_id is a int, not text",
    json.dumps({"messages": [ASK, {**SAY, "name": ["x"]}]}): "message 1: its name is a list, not text",
    r'{"\ud800": 1}': r"(keys: \ud800)",
    '{"messages": [' * 20000: "is no valid JSON",
}


@pytest.mark.parametrize(("row", "said"), ODD.items(), ids=range(len(ODD)))
def test_an_odd_row_is_told_what_is_wrong_with_it(row: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row.encode())
    assert said in str(caught.value)
    str(caught.value).encode()


def test_whole_pairs_and_text_about_surrogates_are_fine() -> None:
    for words in ("so 😀", r"so \ud83d", "so \\"):
        row = json.dumps({"messages": [ASK, {**SAY, "content": words}]})
        assert parse(row.encode()).messages[1]["content"] == words
    assert parse(json.dumps({"id": "\ud83d", "messages": [ASK, SAY]}).encode()).messages  # nothing is trained on an id


def test_a_run_counts_odd_rows_and_goes_on(tmp_path: Path) -> None:
    made = corpus(save_target(tmp_path / "target", layers=1), tmp_path, [{"messages": [ASK, SAY]}])
    (tmp_path / "train.jsonl").write_text("\n".join([*ODD, json.dumps({"messages": [ASK, SAY]})]) + "\n")
    with pytest.raises(UserError, match=f"{len(ODD)} of {len(ODD) + 1} rows are bad"):
        made.dataset("train")
    made._max_bad_fraction = 0.99
    data = made.dataset("train")
    assert len(data) == 1 and data.summary.bad == len(ODD) and data.place(0).endswith(f":{len(ODD) + 1}")


def test_what_a_tokenizer_or_template_did_not_foresee_is_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def render(self: Renderer, conversation: Any) -> Any:
        raise TypeError("half a \ud83d\nand more")

    monkeypatch.setattr(Renderer, "render", render)
    made = Tokenise(renderer("qwen2.5"), max_length=8, messages_key=None, media="refuse").row(json.dumps({"messages": [ASK, SAY]}).encode(), 0)
    assert made.problem == r"cannot be rendered (TypeError: half a \ud83d)" and made.ids.size == 0


def test_an_array_that_nests_too_deep_is_said_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 200000)
    (source,) = find_sources(str(tmp_path / "a.json"), config_key="data.train")
    with pytest.raises(UserError, match="is no valid JSON after row 0"):
        list(read_rows(source, config_key="data.train"))


KEYS = st.sampled_from(
    "role from content value messages conversations text type tool_calls function name arguments id tool_call_id finish tools reasoning_content "
    "input_ids loss_mask labels attention_mask images image_url url prompt instruction input output history chosen system functions function_call weight train "
    "chat_template_kwargs thinking tool_use tool_result parameters user assistant gpt human tool system image".split()
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(), KEYS, st.text(st.characters(), max_size=6), st.sampled_from(["\ud83d", "a\x00", "{", "[]"])
)
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text") | LEAVES, "text": st.text(max_size=4) | LEAVES}), max_size=3)
CALLS = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": LEAVES, "arguments": ANYTHING})}, optional={"id": LEAVES}), max_size=2)
MORE = {"tool_calls": CALLS | ANYTHING, "reasoning_content": LEAVES, "name": LEAVES, "tool_call_id": LEAVES, "finish": LEAVES}
WORDS = st.text(max_size=6)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"]) | LEAVES
OPENAI = st.fixed_dictionaries({"role": ROLES, "content": WORDS | PARTS | LEAVES}, optional=MORE)
SHAREGPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | LEAVES, "value": WORDS | LEAVES})
MESSAGES = st.lists(OPENAI | SHAREGPT | ANYTHING, max_size=4)
TALK = st.tuples(st.text(max_size=6) | PARTS, st.fixed_dictionaries({"role": st.just("assistant"), "content": st.text(max_size=6) | PARTS}, optional=MORE)).map(
    lambda two: [{"role": "user", "content": two[0]}, two[1]]
)  # fmt: skip
ROWS = (
    st.fixed_dictionaries(
        {"messages": TALK | MESSAGES}, optional={"tools": ANYTHING, "finish": LEAVES, "images": ANYTHING, "system": ANYTHING, "prompt": ANYTHING}
    )
    | ANYTHING
)
PAIRS = st.fixed_dictionaries({"prompt": ANYTHING, "completion": ANYTHING}, optional={"system": LEAVES, "history": ANYTHING, "chat_template_kwargs": ANYTHING})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ROWS | PAIRS, st.sampled_from(["qwen2.5", "qwen3", "gpt-oss", "gemma-3", "kimi-k2"]), st.sampled_from(["refuse", "placeholder", "engine"]), st.booleans()
)
def test_any_row_is_a_conversation_or_a_bad_row(row: Any, family: str, media: str, escaped: bool) -> None:
    """The net that catches what was not foreseen is not used here: ``parse`` and ``render`` say themselves what is wrong."""
    text = json.dumps(row, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    try:
        found = parse(text, media=media)
        if found.input_ids is None:
            rendered = renderer(family).render(found)
            assert rendered.ids.shape == rendered.mask.shape and np.isin(rendered.mask, [0, 1]).all()
    except RowError as error:
        str(error).encode()


def test_tokens_and_messages_may_be_mixed_where_the_target_renders(tmp_path: Path) -> None:
    made = corpus(save_target(tmp_path / "target", layers=1), tmp_path, [None, {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"messages": [ASK, SAY]}])
    made._max_bad_fraction = 0.5
    data = made.dataset("train")
    assert len(data) == 2 and data.summary.bad == 1 and data.ids(0).tolist() == [1, 2, 3] and data.mask(1).any()
