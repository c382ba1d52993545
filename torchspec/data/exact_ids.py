"""Generated answers as training rows: messages where training renders them to the very ids that were generated, else the ids themselves.

Messages alone lose what a template writes from other fields (thinking, calls, the end token that was chosen) and what tokenizes in another way than the target
wrote it. How a template shows an answer is found by rendering two stand-ins, so no family has a parser here; whether a row is right, by rendering it:

    <|channel|>analysis<|message|>THOUGHT<|end|><|start|>assistant<|channel|>final<|message|>WORDS<|return|>
    └─────────── head ───────────┘       └───────────────────── middle ─────────────────────┘
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torchspec.data.answer_spans import alike
from torchspec.data.conversations import Conversation, Message, RowError, parse, reasoning_of
from torchspec.data.render import Renderer, tokenizer_fingerprint

_WORDS, _THOUGHT, _NAME = "qz words zq", "xv thought vx", "qzname"


@dataclass(frozen=True)
class Generated:
    """One answer as ids."""

    prompt: list[int]
    """What was sent."""
    ids: list[int]
    """What came, end token included where it was reached."""


@dataclass(frozen=True)
class _Shape:
    """How a template shows an answer: head, thinking, middle (None: there is no thinking), words, tail."""

    head: str
    middle: str | None
    tail: str


class ExactRows:
    """See the module.

    Args:
        renderer: as training has it by default: told nothing by ``template_args``.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._fingerprint = tokenizer_fingerprint(renderer.tokenizer)
        self._shapes: dict[tuple[Any, ...], tuple[list[_Shape], list[str]]] = {}

    def message(self, asked: Conversation, ids: list[int], *, cut: bool) -> Message | None:
        """Generated ids as a message for what follows in the conversation.

        Args:
            asked: the conversation that it answers.
            ids: generated.
            cut: a length limit ended it.

        Returns:
            None for a call, and where thinking and words are not told apart.
        """
        renderer = self._renderer
        text = renderer.decode(ids[:-1] if ids and renderer.ends(ids[-1]) else ids)
        shapes, calls = self._shapes_of(asked)
        if "\ufffd" in text or any(call in text for call in calls):
            return None
        for shape in shapes:
            if not text.startswith(shape.head):
                continue
            thought, words = "", text[len(shape.head) :]
            if shape.middle is not None:
                thought, found, after = words.partition(shape.middle)
                if not found and (close := shape.middle.strip()):  # nothing after the thinking, or other space around its end
                    thought, found, after = (part.strip() for part in words.partition(close))
                if not found:
                    continue
                words = after
            if shape.tail:
                if not words.endswith(shape.tail) and not cut:
                    continue
                words = words.removesuffix(shape.tail)
            if renderer.has_control(thought + words):
                continue
            return {"role": "assistant", "content": words, **({"reasoning_content": thought} if thought.strip() else {})}
        return None

    def as_ids(self, row: dict[str, Any], generated: Sequence[Generated], *, kept: bool) -> dict[str, Any]:
        """What a row needs to be trained on what was generated.

        Args:
            row: with its ``conversations``.
            generated: its answers, in order.
            kept: it also has answers that were given (calls whose results are there).

        Returns:
            ``input_ids`` and ``loss_mask`` of the last prompt and its answer, with what was generated earlier supervised where that prompt shows it; empty
            where training renders the messages to the same.
        """
        whole = generated[-1].prompt + generated[-1].ids
        mask, lost = np.zeros(len(whole), dtype=np.uint8), False
        for answer in generated:
            begin, end = len(answer.prompt), len(answer.prompt) + len(answer.ids)
            if whole[:end] == answer.prompt + answer.ids:
                mask[begin:end] = 1
            else:
                lost = True  # the template shows it in another way to what follows
        try:
            rendered = self._renderer.render(parse(json.dumps(row).encode()))
        except RowError:
            rendered = None
        if rendered is not None and rendered.ids[: len(whole)].tolist() == whole and not rendered.mask[len(whole) :].any():
            shown = rendered.mask[: len(whole)]
            if np.array_equal(shown, mask) or (kept and not lost and (shown >= mask).all()):
                return {}
        return {"input_ids": whole, "loss_mask": mask.tolist(), "tokenizer": self._fingerprint}

    def _shapes_of(self, conversation: Conversation) -> tuple[list[_Shape], list[str]]:
        """Ways in which answers are shown here, with thinking first, and what calls begin with behind their thinking (nothing where there are no tools)."""
        before, tools = conversation.messages, conversation.tools
        asked = max((i for i, message in enumerate(before) if message["role"] == "user"), default=0)
        since = tuple((str(m["role"]), bool(m.get("tool_calls")), m["role"] == "assistant" and bool(reasoning_of(m))) for m in before[asked:])
        key = (bool(tools), str(before[0]["role"]), since, json.dumps(dict(conversation.template_args), sort_keys=True))
        if key in self._shapes:
            return self._shapes[key]
        shapes, begins = [], []
        call = {"id": f"functions.{_NAME}:0", "type": "function", "function": {"name": _NAME, "arguments": {"x": "x"}}}
        for thought in (_THOUGHT, None):
            message: Message = {"role": "assistant", "content": _WORDS, **({"reasoning_content": thought} if thought else {})}
            shown = self._renderer.shown(replace(conversation, messages=(*before, message))) or ""
            head, there, tail = shown.partition(_WORDS)
            tail = self._renderer.before_control(tail)
            middle = None
            if thought:
                head, found, middle = head.partition(thought)
                there = there if found and middle else ""
            if there:
                shapes.append(_Shape(head, middle, tail if tail.strip() else ""))
            called = replace(conversation, messages=(*before, {**message, "content": "", "tool_calls": [call]}))
            calling = self._renderer.shown(called) if tools else None
            begin, named, _ = (calling or "").partition(_NAME)
            begin = begin[alike(begin, shown) :].strip()  # behind what an answer in words begins with as well
            if named and begin and _THOUGHT not in begin:
                begins.append(begin)
        if shapes:  # else this row is special
            self._shapes[key] = shapes, begins
        return shapes, begins
