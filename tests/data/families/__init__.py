"""Chat formats of the families that drafts are trained for: templates written for these tests from the formats' public descriptions, what each must supervise,
and golden ids and masks. ``python -m tests.data.families`` writes the golden file anew, after the hand-written expectations hold.

All families share one small byte-level tokenizer (``tokenizer.json``), to which each adds its control tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from torchspec.data.conversations import Conversation
from torchspec.data.render import Rendered, Renderer

FOLDER = Path(__file__).parent
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"name": "dog"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, thought: str | None = None, call: bool = False) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {}), **({"tool_calls": [CALL]} if call else {})}


RESULT = {"role": "tool", "content": "over there", "name": "find", "tool_call_id": "c1"}
CASES: dict[str, Conversation] = {
    "single": Conversation(messages=(user("the cat"), answer("runs over"))),
    "system": Conversation(messages=({"role": "system", "content": "we are small"}, user("the cat"), answer("runs over"))),
    "turns": Conversation(messages=(user("one"), answer("two three"), user("why"), answer("because it is"))),
    "thinking": Conversation(messages=(user("one"), answer("two three", "it is a dog"), user("why"), answer("because it is", "where is it"))),
    "tools": Conversation(messages=(user("where is it"), answer("", call=True), RESULT, answer("under the cat")), tools=TOOLS),
    "thinking tools": Conversation(messages=(user("where is it"), answer("", "we call", True), RESULT, answer("under the cat", "now we know")), tools=TOOLS),
    "empty": Conversation(messages=(user("the cat"), answer(""))),
    "cut": Conversation(messages=(user("the cat"), answer("runs over")), cut=frozenset({1})),
}


@dataclass(frozen=True)
class Family:
    """One format."""

    ends: tuple[str, ...]
    """Tokens that end what the target generates; the first is the tokenizer's own end."""
    expected: dict[str, list[str] | None]
    """Per case, the text under each run of the mask; None where the format has no such case and the row is refused."""
    bos: str = "<s>"
    tags: str = r"<[|｜][^<>]*?[|｜]>"
    """Pattern of the control tokens in the template."""
    more: tuple[str, ...] = ()
    """Control tokens that the pattern does not find."""


def chatml(call: str) -> dict[str, list[str] | None]:
    """Formats without any thinking of their own: it stands in the content, which history shows as it is."""
    return {
        "single": ["runs over<|im_end|>"],
        "system": ["runs over<|im_end|>"],
        "turns": ["two three<|im_end|>", "because it is<|im_end|>"],
        "thinking": ["<think>\nit is a dog\n</think>\n\ntwo three<|im_end|>", "<think>\nwhere is it\n</think>\n\nbecause it is<|im_end|>"],
        "tools": [f"{call}<|im_end|>", "under the cat<|im_end|>"],
        "thinking tools": [f"<think>\nwe call\n</think>\n\n\n{call}<|im_end|>", "<think>\nnow we know\n</think>\n\nunder the cat<|im_end|>"],
        "empty": ["<|im_end|>"],
        "cut": ["runs over"],
    }


HERMES = '<tool_call>\n{"name": "find", "arguments": {"name": "dog"}}\n</tool_call>'
CODER = "<tool_call>\n<function=find>\n<parameter=name>\ndog\n</parameter>\n</function>\n</tool_call>"
LLAMA = '{"name": "find", "parameters": {"name": "dog"}}'
KIMI = '<|tool_calls_section_begin|><|tool_call_begin|>c1<|tool_call_argument_begin|>{"name": "dog"}<|tool_call_end|><|tool_calls_section_end|>'
DSML = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="find">\n<｜DSML｜parameter name="name" string="true">dog</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
DEEPSEEK = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>find<｜tool▁sep｜>{"name": "dog"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
MINIMAX = '<minimax:tool_call>\n<invoke name="find">\n<parameter name="name">dog</parameter>\n</invoke>\n</minimax:tool_call>'
GLM = "<tool_call>find\n<arg_key>name</arg_key>\n<arg_value>dog</arg_value>\n</tool_call>"
HARMONY_CALL = ' to=functions.find<|channel|>commentary json<|message|>{"name": "dog"}<|call|>'


def swapped(expected: dict[str, list[str] | None], **changes: Any) -> dict[str, list[str] | None]:
    return {**expected, **{name.replace("_", " "): value for name, value in changes.items()}}


def ended(expected: dict[str, list[str] | None], end: str) -> dict[str, list[str] | None]:
    """The same words with another end token."""
    return {case: None if runs is None else [run.replace("<|im_end|>", end) for run in runs] for case, runs in expected.items()}


FAMILIES: dict[str, Family] = {
    "llama-3": Family(
        ("<|eot_id|>",),
        # a call replaces the content, so that thinking beside it is lost: that turn is left out
        swapped(ended(chatml(LLAMA), "<|eot_id|>"), thinking_tools=["<think>\nnow we know\n</think>\n\nunder the cat<|eot_id|>"]),
        bos="<|begin_of_text|>",
    ),
    "llama-4": Family(
        ("<|eot|>",),
        swapped(
            ended(chatml(f"<|python_start|>{LLAMA}<|python_end|>"), "<|eot|>"),
            thinking_tools=[
                f"<think>\nwe call\n</think>\n\n<|python_start|>{LLAMA}<|python_end|><|eot|>",
                "<think>\nnow we know\n</think>\n\nunder the cat<|eot|>",
            ],
        ),
        bos="<|begin_of_text|>",
    ),
    "qwen2.5": Family(("<|im_end|>", "<|endoftext|>"), chatml(HERMES)),
    "qwen3": Family(
        ("<|im_end|>", "<|endoftext|>"),
        swapped(
            chatml(HERMES),
            # without thinking the prompt shows an empty one, which history and calls before the answer do not: only the last answer is as generated
            turns=["because it is<|im_end|>"],
            thinking=["<think>\nwhere is it\n</think>\n\nbecause it is<|im_end|>"],
            tools=["under the cat<|im_end|>"],
            thinking_tools=[f"<think>\nwe call\n</think>\n\n{HERMES}<|im_end|>", "<think>\nnow we know\n</think>\n\nunder the cat<|im_end|>"],
        ),
    ),
    "qwen3-coder-next": Family(("<|im_end|>", "<|endoftext|>"), chatml(CODER)),
    "deepseek-v3": Family(
        ("<｜end▁of▁sentence｜>",),
        swapped(
            ended(
                chatml(DEEPSEEK),
                "<｜end▁of▁sentence｜>",
            ),
            thinking_tools=[
                f"<think>\nwe call\n</think>\n\n{DEEPSEEK}<｜end▁of▁sentence｜>",
                "<think>\nnow we know\n</think>\n\nunder the cat<｜end▁of▁sentence｜>",
            ],
        ),
        bos="<｜begin▁of▁sentence｜>",
    ),
    "deepseek-r1": Family(
        ("<｜end▁of▁sentence｜>",),
        {
            # it always thinks: an answer without is none of its own
            "single": None,
            "system": None,
            "turns": None,
            "thinking": ["where is it\n</think>\n\nbecause it is<｜end▁of▁sentence｜>"],
            "tools": None,
            "thinking tools": ["now we know\n</think>\n\nunder the cat<｜end▁of▁sentence｜>"],
            "empty": [],
            "cut": None,
        },
        bos="<｜begin▁of▁sentence｜>",
    ),
    "deepseek-v3.2": Family(
        ("<｜end▁of▁sentence｜>",),
        swapped(
            ended(chatml(f"\n\n{DSML}"), "<｜end▁of▁sentence｜>"),
            thinking=["where is it</think>because it is<｜end▁of▁sentence｜>"],
            thinking_tools=[f"we call</think>\n\n{DSML}<｜end▁of▁sentence｜>", "now we know</think>under the cat<｜end▁of▁sentence｜>"],
        ),
        bos="<｜begin▁of▁sentence｜>",
        more=("<｜DSML｜",),
    ),
    "kimi-k2": Family(
        ("<|im_end|>",),
        swapped(
            chatml(KIMI),
            thinking_tools=[f"<think>\nwe call\n</think>\n\n{KIMI}<|im_end|>", "<think>\nnow we know\n</think>\n\nunder the cat<|im_end|>"],
        ),
        more=("<|im_user|>",),
    ),
    "kimi-k2.5": Family(
        ("<|im_end|>",),
        swapped(
            chatml(KIMI),
            thinking=["where is it</think>because it is<|im_end|>"],
            thinking_tools=[f"we call</think>{KIMI}<|im_end|>", "now we know</think>under the cat<|im_end|>"],
        ),
        more=("<|im_user|>",),
    ),
    "minimax-m2": Family(
        ("[e~[",),
        {
            "single": None,
            "system": None,
            "turns": None,
            "thinking": ["where is it\n</think>\n\nbecause it is[e~["],
            "tools": None,
            "thinking tools": [f"we call\n</think>\n\n\n{MINIMAX}[e~[", "now we know\n</think>\n\nunder the cat[e~["],
            "empty": [],
            "cut": None,
        },
        bos="]~!b[",
        more=("]~b]",),
    ),
    "glm-4.5": Family(
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        {
            "single": ["\nruns over<|user|>"],
            "system": ["\nruns over<|user|>"],
            "turns": ["\ntwo three<|user|>", "\nbecause it is<|user|>"],
            "thinking": ["\n<think>where is it</think>\nbecause it is<|user|>"],
            "tools": [f"\n{GLM}<|observation|>", "\nunder the cat<|user|>"],
            "thinking tools": [f"\n<think>we call</think>\n{GLM}<|observation|>", "\n<think>now we know</think>\nunder the cat<|user|>"],
            "empty": ["<|user|>"],
            "cut": ["\nruns over"],
        },
        bos="[gMASK]",
        more=("<sop>",),
    ),
    "gpt-oss": Family(
        ("<|return|>", "<|call|>", "<|endoftext|>"),
        {
            "single": ["<|channel|>final<|message|>runs over<|return|>"],
            "system": ["<|channel|>final<|message|>runs over<|return|>"],
            # history ends an answer by <|end|>, which the target does not generate there
            "turns": ["<|channel|>final<|message|>two three", "<|channel|>final<|message|>because it is<|return|>"],
            "thinking": ["<|channel|>analysis<|message|>where is it<|end|><|start|>assistant<|channel|>final<|message|>because it is<|return|>"],
            "tools": [HARMONY_CALL, "<|channel|>final<|message|>under the cat<|return|>"],
            # the thinking before the call is dropped once the final answer is there; the server that generated that answer showed it
            "thinking tools": [
                f"<|channel|>analysis<|message|>we call<|end|><|start|>assistant{HARMONY_CALL}",
                "<|channel|>analysis<|message|>now we know<|end|><|start|>assistant<|channel|>final<|message|>under the cat<|return|>",
            ],
            "empty": ["<|channel|>final<|message|><|return|>"],
            "cut": ["<|channel|>final<|message|>runs over"],
        },
        bos="<|startoftext|>",
    ),
    "phi-3": Family(
        ("<|end|>", "<|endoftext|>"),
        swapped(
            ended(chatml(""), "<|end|>"),
            tools=["under the cat<|end|>"],
            thinking_tools=["<think>\nnow we know\n</think>\n\nunder the cat<|end|>"],
        ),
        more=("<|user|>", "<|system|>", "<|tool|>"),
    ),
    "phi-4": Family(
        ("<|im_end|>",),
        swapped(
            chatml(""),
            tools=["under the cat<|im_end|>"],
            thinking_tools=["<think>\nnow we know\n</think>\n\nunder the cat<|im_end|>"],
        ),
    ),
    "gemma-3": Family(
        ("<end_of_turn>",),
        swapped(
            ended(chatml(""), "<end_of_turn>"),
            tools=["under the cat<end_of_turn>"],
            thinking_tools=["<think>\nnow we know\n</think>\n\nunder the cat<end_of_turn>"],
        ),
        bos="<bos>",
        tags=r"<(?:start|end)_of_(?:turn|image)>",
    ),
    "gemma-4": Family(
        ("<turn|>", "<|tool_response>"),
        swapped(
            ended(chatml(""), "<turn|>"),
            # without thinking the prompt closes an empty one, which no message shows: only the last answer is as generated
            turns=["because it is<turn|>"],
            thinking=["<|channel>thought\nwhere is it<channel|>because it is<turn|>"],
            tools=["under the cat<turn|>"],
            thinking_tools=[
                '<|channel>thought\nwe call<channel|><|tool_call>call:find{name:<|"|>dog<|"|>}<tool_call|><|tool_response>',
                "<|channel>thought\nnow we know<channel|>under the cat<turn|>",
            ],
        ),
        bos="<bos>",
        tags=r"<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>",
    ),
    "ling": Family(
        ("<|role_end|>",),
        swapped(
            ended(chatml(HERMES), "<|role_end|>"),
            thinking_tools=[f"<think>\nwe call\n</think>\n\n\n{HERMES}<|role_end|>", "<think>\nnow we know\n</think>\n\nunder the cat<|role_end|>"],
        ),
        more=("<role>", "</role>"),
    ),
    "marked": Family(
        ("<|im_end|>",),
        swapped(
            chatml(""),
            tools=["under the cat<|im_end|>"],
            thinking_tools=["<think>\nnow we know\n</think>\n\nunder the cat<|im_end|>"],
        ),
    ),
}


@cache
def tokenizer(name: str) -> Any:
    """The small tokenizer with a family's control tokens and template."""
    from transformers import PreTrainedTokenizerFast

    family, template = FAMILIES[name], (FOLDER / f"{name}.jinja").read_text()
    found = PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"), bos_token=family.bos, eos_token=family.ends[0])
    controls = dict.fromkeys([family.bos, *family.ends, *re.findall(family.tags, template), *family.more])
    found.add_special_tokens({"additional_special_tokens": list(controls)})
    found.chat_template = template
    return found


def renderer(name: str, **options: Any) -> Renderer:
    """The family's renderer, told what its targets end with."""
    found = tokenizer(name)
    return Renderer(found, name=name, end_ids=[found.convert_tokens_to_ids(end) for end in FAMILIES[name].ends], **options)


def supervised(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The text under each run of the mask."""
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], rendered.mask, [0]])))
    return [tokenizer.decode(rendered.ids[low:high].tolist(), clean_up_tokenization_spaces=False) for low, high in zip(bounds[::2], bounds[1::2])]


def write_golden() -> None:
    """Ids, and mask as runs, of every family and case; only when the expectations hold."""
    golden: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        for case, conversation in CASES.items():
            if family.expected[case] is None:
                continue
            rendered = renderer(name).render(conversation)
            assert supervised(tokenizer(name), rendered) == family.expected[case], (name, case)
            runs = np.flatnonzero(np.diff(np.concatenate([[0], rendered.mask, [0]]))).tolist()
            golden.setdefault(name, {})[case] = {"ids": rendered.ids.tolist(), "mask": runs}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(cases)}" for name, cases in golden.items())
    (FOLDER / "golden.json").write_text("{\n" + lines + "\n}\n")
