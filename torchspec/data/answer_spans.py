"""Where a rendered conversation shows what the target generated: character spans of its answers.

*Prefix rendering*. Answer i is what ``render(messages[:i+1])`` has beyond ``render(messages[:i], add_generation_prompt=True)``, as far as the whole
conversation shows the same:

    before    ...<|im_start|>assistant\\n
    upto      ...<|im_start|>assistant\\nHello<|im_end|>\\n
    text      ...<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user\\n...
                                        ^ begin         ^ stop (what follows the end token is dropped by tokens, in render.py)

A template that rewrites earlier turns (reasoning models drop their thinking) breaks this for them, and they are not supervised: no server ever generated
them in that context. ``supervise: all`` takes their words nevertheless, found by rendering once more with other words in their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchspec.data.conversations import Conversation, Message, RowError, reasoning_of, words_of
from torchspec.data.template import THINKING

if TYPE_CHECKING:
    from torchspec.data.template import ChatTemplate

SUPERVISE = ("auto", "all", "last")
"""auto: every answer that is shown as it was generated. last: of these, the last alone. all: also the words of answers that the template shows rewritten."""
_STAND_INS = ("qz torchspec zq", "xv torchspec vx", "jk torchspec kj")


@dataclass(frozen=True)
class Span:
    """One answer in the text."""

    begin: int
    stop: int
    """Character after the last; the end token may lie before it with whitespace behind, or right at it."""
    message: int
    """Index of the message, -1 where it is not known (text rendered elsewhere)."""
    generated: bool = True
    """False: its context was rewritten, and only an end token that ends answers everywhere may be supervised."""


class AnswerFinder:
    """Finds the answers of conversations under one template.

    Args:
        template: the target's.
        special: control tokens as text, by id.
        end_ids: tokens that end what the target generates.
    """

    def __init__(self, template: ChatTemplate, *, special: dict[int, str], end_ids: frozenset[int]) -> None:
        self.template = template
        self._headers: dict[bool, str] = {}
        self.end_texts = [special[i] for i in sorted(end_ids) if i in special]
        self.control = re.compile("|".join(re.escape(text) for text in sorted(set(special.values()), key=len, reverse=True)) or r"(?!)")

    def find(self, conversation: Conversation, *, supervise: str) -> tuple[str, list[Span]]:
        """(text, answers in it). The text ends with the end token also where the template leaves it to the target's next header.

        Raises:
            RowError: when the template refuses the conversation.
        """
        template, messages, tools = self.template, conversation.messages, conversation.tools
        variables = template.variables(conversation)
        text = plain = template.text(messages, tools, generate=False, variables=variables)
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found: dict[int, Span] = {}
        for i in reversed(indices if supervise != "last" else indices[-1:]):
            before = template.text(messages[:i], tools, generate=True, variables=variables)
            last = i == len(messages) - 1
            upto = text if last else template.text(messages[: i + 1], tools, generate=False, variables=variables)
            stop = self._as_generated(text, before, upto, messages[i])
            if stop is None and last and (whole := self._continued(before, conversation, variables)) is not None:
                text, stop = whole, len(whole)  # what the last answer really follows; earlier ones are looked for in it
            if stop is not None:
                found[i] = Span(len(before), stop, i)
        if template.marked:
            self._add_marked(found, conversation, text, variables, indices)
        if supervise == "all":
            for i in indices:
                if i not in found and (span := self._rewritten(plain, conversation, i, variables)) is not None:
                    if text.startswith(plain[: span.stop]):
                        found[i] = span
        elif supervise == "last":
            found = {i: span for i, span in found.items() if i == indices[-1]}
        if indices and indices[-1] in found and indices[-1] == len(messages) - 1 and indices[-1] not in conversation.cut:
            text, found[indices[-1]] = self._ended(text, found[indices[-1]], messages[-1])
        return text, [found[i] for i in sorted(found)]

    def _as_generated(self, text: str, before: str, upto: str, message: Message) -> int | None:
        """Where the answer that ``upto`` ends with stops in the text; None when the text shows it otherwise."""
        if not (text.startswith(before) and upto.startswith(before)):
            return None
        stop = len(upto) if text.startswith(upto) else self._common(upto, text)
        if self.control.sub("", upto[stop:]).strip():
            return None  # words of it are missing
        return stop if shows(upto[len(before) :], message) else None

    def _common(self, one: str, two: str) -> int:
        """Characters that both begin with; two control tokens that begin alike (``<|end|>``, ``<|endoftext|>``) are not cut."""
        stop = alike(one, two)
        for match in self.control.finditer(one, max(stop - 64, 0)):
            if match.start() < stop < match.end():
                return match.start()
        return stop

    def _continued(self, before: str, conversation: Conversation, variables: dict[str, Any]) -> str | None:
        """The last generation prompt and what the target generated after it, for templates whose text of the whole conversation does not go on from there.

        What it generated is looked for in the conversation up to the last question with the answer right behind it, in ways that need more and more of a guess:
        as it stands there (Harmony drops the thinking before a call once the final answer is there); with its thinking as the template shows it beside a call
        (Kimi K2 Thinking and Gemma 4 show none beside an answer); without thinking, behind a prompt that closes an empty one (Gemma 4); put together from
        thinking and words, where the prompt opens the thinking (DeepSeek R1). None where nothing applies.
        """
        message, tools = conversation.messages[-1], conversation.tools
        asked = conversation.messages[: 1 + max((i for i, m in enumerate(conversation.messages) if m["role"] == "user"), default=-1)]
        if not asked:
            return None

        def render(*more: Message, generate: bool = False) -> str:
            return self.template.text([*asked, *more], tools, generate=generate, variables=variables)

        prompt, shown = render(generate=True), render(message)
        if shown.startswith(prompt) and shows(shown[len(prompt) :], message):
            return before + shown[len(prompt) :]
        thought, words = reasoning_of(message), words_of(message).split("</think>")[-1].strip()
        if not thought:
            switches = [variables[name] for name in THINKING if name in variables]
            base, header = render(), self._common(prompt, shown)
            if switches and not any(switches) and prompt.startswith(base) and header > len(base) and shows(shown[header:], message):
                return before + shown[header:]
            return None
        if (whole := self._with_thought(render, message, thought, words)) is not None and whole.startswith(prompt) and shows(whole[len(prompt) :], message):
            return before + whole[len(prompt) :]
        opened = before.rstrip()
        if not opened.endswith("<think>") or not words or words not in shown:
            return None
        end = shown[shown.rindex(words) + len(words) :]
        if message.get("reasoning_content") is None:
            generated = words_of(message).removeprefix("<think>" + before[len(opened) :]).removeprefix("<think>")
        else:
            generated = f"{thought}\n</think>\n\n{words}" if before.endswith("\n") else f"{thought}</think>{words}"
        return before + generated.rstrip() + end

    def _with_thought(self, render: Callable[..., str], message: Message, thought: str, words: str) -> str | None:
        """The answer's text with its thinking where the template shows it beside a call; None where it shows none even there."""
        call = {"id": "functions.x:0", "type": "function", "function": {"name": "x", "arguments": {"x": "x"}}}
        bare: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            without, beside = render(bare), render({**bare, "reasoning_content": thought})
        except RowError:
            return None
        plain = render({key: value for key, value in message.items() if key != "reasoning_content"} | {"content": words})
        kept = min(alike(without[::-1], beside[::-1]), len(without) - self._common(without, beside))  # of the call, behind the thinking
        head = without[: len(without) - kept]
        return beside[: len(beside) - kept] + plain[len(head) :] if thought in beside and plain.startswith(head) else None

    def _add_marked(self, found: dict[int, Span], conversation: Conversation, text: str, variables: dict[str, Any], indices: list[int]) -> None:
        """Answers that only the template's own markers show. Where prefix rendering found one too, it stands: markers often miss the end token."""
        spans = self.template.marked_spans(conversation, variables)
        if len(spans) != len(indices):
            spans, indices = spans[-1:], indices[-1:]
        for (begin, stop), i in zip(spans, indices, strict=True):
            if i not in found and stop <= len(text) and shows(text[begin:stop], conversation.messages[i]):
                found[i] = Span(begin, stop, i, generated=False)

    def _rewritten(self, text: str, conversation: Conversation, i: int, variables: dict[str, Any]) -> Span | None:
        """The words of answer i where the text shows them, by what changes when they do."""
        words = words_of(conversation.messages[i]).split("</think>")[-1].strip()
        if not words:
            return None
        other = next(s for s in _STAND_INS if s[0] != words[0] and s[-1] != words[-1])
        messages = list(conversation.messages)
        messages[i] = {"role": "assistant", "content": other}
        changed = self.template.text(messages, conversation.tools, generate=False, variables=variables)
        begin = alike(text, changed)
        tail = alike(text[::-1], changed[::-1])
        if text[begin : len(text) - tail].strip() != words:
            return None
        stop = len(text) - tail
        end = self.control.match(text, stop)
        return Span(begin, end.end() if end is not None and end.group() in self.end_texts else stop, i, generated=False)

    def _ended(self, text: str, span: Span, message: Message) -> tuple[str, Span]:
        """The last answer with an end token. Some templates show none (GLM): what ends an answer is then the header of what follows."""
        shown = text[span.begin : span.stop]
        controls = list(self.control.finditer(shown))
        if controls and not shown[controls[-1].end() :].strip():
            return text, span
        end = self._next_header(bool(message.get("tool_calls")))
        return (text, span) if not end else (text + end, Span(span.begin, len(text) + len(end), span.message))

    def _next_header(self, called: bool) -> str:
        """The end token with which what follows an answer begins, "" where answers have one of their own. Found on a conversation of two words."""
        if called not in self._headers:
            call = {"id": "x", "type": "function", "function": {"name": "x", "arguments": {"x": "x"}}}
            asked: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", **({"tool_calls": [call]} if called else {})}]
            following: Message = {"role": "tool", "name": "x", "tool_call_id": "x", "content": "x"} if called else {"role": "user", "content": "x"}
            variables = self.template.variables(Conversation())
            try:
                short, longer = (self.template.text(messages, None, generate=False, variables=variables) for messages in (asked, [*asked, following]))
            except RowError:
                short, longer = "", ""
            tail = longer[len(short) :] if longer.startswith(short) else ""
            own = list(self.control.finditer(short))
            has_own = bool(own) and not short[own[-1].end() :].strip()
            self._headers[called] = "" if has_own else next((end for end in self.end_texts if tail.startswith(end)), "")
        return self._headers[called]

    # -- text that was rendered elsewhere

    def find_in(self, text: str, *, supervise: str) -> list[Span]:
        """Answers of a text that was rendered elsewhere: from each generation prompt to the next token that ends an answer.

        Raises:
            RowError: when it has none, or lacks the beginning that the template gives.
        """
        user, answer = {"role": "user", "content": "torchspec"}, {"role": "assistant", "content": "qz"}
        variables = self.template.variables(Conversation())
        asked = self.template.text([user], None, generate=False, variables=variables)
        prompted = self.template.text([user], None, generate=True, variables=variables)
        shown = self.template.text([user, answer], None, generate=False, variables=variables)
        at = self._common(prompted, asked)
        prompt, begin = prompted[at:], shown.rindex("qz")
        header = prompted[at : min(self._common(prompted, shown), begin)]
        start = str(self.template.tokenizer.bos_token or "")
        if start and shown.startswith(start) and not text.startswith(start):
            raise RowError(f"text does not begin with {start!r}, as the target's chat template does")
        history = self.template.text([user, answer, user], None, generate=False, variables=variables)
        end, past = self.control.search(shown, begin), self.control.search(history, history.rindex("qz"))
        ends = {*self.end_texts, *([end.group()] if end is not None else [])}
        stops = {*ends, *([past.group()] if past is not None else [])}
        spans, at = [], 0
        while header.strip() and (at := text.find(header, at)) >= 0:
            begin = at + len(prompt if text.startswith(prompt, at) else header)
            match = next((match for match in self.control.finditer(text, begin) if match.group() in stops), None)
            stop = len(text) if match is None else match.end() if match.group() in ends else match.start()
            spans.append(Span(begin, stop, -1))
            at = max(stop, begin)
        if not spans:
            raise RowError(f"text has no answer: {header!r}, with which the target's chat template begins one, is not in it")
        return spans[-1:] if supervise == "last" else spans


def shows(text: str, message: Message) -> bool:
    """Whether a rendered text still has the message's words, its thinking and its calls."""
    words = words_of(message).split("</think>")[-1].strip()
    calls = message.get("tool_calls", ())
    thought = reasoning_of(message).strip()
    at = text.rfind(words)
    return at >= 0 and thought in text[:at] and all(call["function"]["name"] in text or call.get("id", text + " ") in text for call in calls)


def alike(one: str, two: str) -> int:
    """Characters that both begin with."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
