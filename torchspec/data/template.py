"""The target's chat template: text of a conversation as serving renders it.

Serving here means vLLM's chat endpoint: tool arguments are objects, reasoning is given under the names that templates know, parts of text are joined by a
newline where a template takes text alone. What is ours is only what makes a rendering repeatable and true to the row: the date is pinned, and a template
with a switch for thinking is told whether the answer thinks. No system prompt is ever added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from torchspec.data.conversations import Conversation, Message, RowError, media_of, reasoning_of, words_of
from torchspec.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PINNED_DATE = datetime(2024, 7, 26)
"""What a template that prints today's date is told, so that the same data renders to the same tokens every day."""
THINKING = ("enable_thinking", "thinking")
"""Variables by which templates of reasoning models switch thinking on and off."""
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


class ChatTemplate:
    """Renders messages to text.

    Args:
        tokenizer: the target's tokenizer.
        name: path or id of the target, for errors.
        variables: given to the template as they are (``data.template_args``), over what is chosen here; what a row says goes over both.

    Raises:
        UserError: without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, variables: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "data.target.path",
                name,
                "ships no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
                "add chat_template.jinja to the target (its publisher's, or that of the model it was tuned from), or give rows with input_ids and loss_mask",
            )
        self.tokenizer = tokenizer
        given: str | dict[str, str] = tokenizer.chat_template
        self.source = given if isinstance(given, str) else "\n".join(given.values())
        self.marked = bool(_GENERATION.search(self.source))
        """Whether it says itself what the target generates."""
        self._given = dict(variables or {})
        self._fixed: dict[str, Any] = {}
        if "date_string" in self.source:
            self._fixed["date_string"] = PINNED_DATE.strftime("%d %b %Y")
        if "strftime_now" in self.source:
            self._fixed["strftime_now"] = PINNED_DATE.strftime
        self._free = free = set[str]().union(*map(_free_variables, [given] if isinstance(given, str) else given.values()))
        self._switches = [name for name in THINKING if name in free]
        self._reasoning_keys = [
            key
            for key in ("reasoning_content", "reasoning", "thinking")
            if re.search(rf"""\.{key}\b|\[\s*['"]{key}['"]\s*\]|['"]{key}['"]\s+in\b""", self.source)
        ]
        self._takes_parts = self._probe_parts()
        self._calls_as_text = not self._takes_calls({"x": "x"}) and self._takes_calls('{"x": "x"}')

    def variables(self, conversation: Conversation) -> dict[str, Any]:
        """What the template is told for this conversation: whether the answers to the last question think, what the user gave, and what the row says."""
        chosen = dict(self._fixed)
        if self._switches and conversation.messages and conversation.messages[-1]["role"] == "assistant":
            asked = max((i for i, message in enumerate(conversation.messages) if message["role"] == "user"), default=-1)
            thinks = any(reasoning_of(message) for message in conversation.messages[asked + 1 :] if message["role"] == "assistant")
            chosen.update(dict.fromkeys(self._switches, thinks))
        return chosen | self._given | dict(conversation.template_args)

    def ignored(self, conversation: Conversation) -> tuple[str, ...]:
        """What a row says that this template never looks at: its tools, variables of ``chat_template_kwargs``."""
        if not self._free or (not conversation.template_args and not conversation.tools):
            return ()
        names = [f"chat_template_kwargs.{name}" for name in conversation.template_args if name not in self._free]
        return (*names, *(["tools"] if conversation.tools and "tools" not in self._free else []))

    def text(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generate: bool, variables: Mapping[str, Any]) -> str:
        """The text of messages, with the generation prompt behind it or not.

        Raises:
            RowError: when the template refuses them.
        """
        try:
            rendered: str = self.tokenizer.apply_chat_template(  # type: ignore[assignment]
                [self._message(message) for message in messages], tools=cast(Any, tools), tokenize=False, add_generation_prompt=generate, **variables
            )
        except RowError:
            raise
        except Exception as error:  # templates raise whatever their author chose
            raise RowError(f"is refused by the target's chat template: {first_line(error)}") from None
        return rendered

    def marked_spans(self, conversation: Conversation, variables: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(first character, character after the last) of what stands between the template's generation markers.

        Raises:
            RowError: when the template refuses the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        try:
            rendered = render(
                conversations=[[self._message(message) for message in conversation.messages]],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(None, cast(Any, conversation.tools)),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **variables},
            )
        except RowError:
            raise
        except Exception as error:
            raise RowError(f"is refused by the target's chat template: {first_line(error)}") from None
        return [(int(begin), int(stop)) for begin, stop in rendered[1][0]]

    def _message(self, message: Message) -> Message:
        """As the template wants it."""
        shown = dict(message)
        if not isinstance(message["content"], str) and not self._takes_parts:
            if media_of(message):
                raise RowError(f"has a part of type {media_of(message)[0]!r}, and the target's chat template takes text alone")
            shown["content"] = words_of(message)
        if self._calls_as_text and "tool_calls" in shown:
            calls = [(call, call["function"]) for call in shown["tool_calls"]]
            shown["tool_calls"] = [{**call, "function": {**f, "arguments": json.dumps(f["arguments"], ensure_ascii=False)}} for call, f in calls]
        reasoning = shown.pop("reasoning_content", None)
        if reasoning:
            if self._reasoning_keys:
                shown.update(dict.fromkeys(self._reasoning_keys, reasoning))
            else:
                shown["content"] = f"<think>\n{reasoning}\n</think>\n\n{words_of(message)}"
        return shown

    def _takes_calls(self, arguments: Any) -> bool:
        """Whether it renders a call whose arguments are given like this (some of the older ones want text)."""
        call = {"id": "functions.x:0", "type": "function", "function": {"name": "x", "arguments": arguments}}
        probe: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            self.tokenizer.apply_chat_template(probe, tokenize=False, **self._fixed)
        except Exception:  # it adds text and an object
            return False
        return True

    def _probe_parts(self) -> bool:
        """Whether it renders content given as a list of parts."""
        probe: Any = [{"role": "user", "content": [{"type": "text", "text": "torchspec"}]}]
        try:
            rendered = str(self.tokenizer.apply_chat_template(probe, tokenize=False, **self._fixed))
        except Exception:  # it takes no lists
            return False
        return "torchspec" in rendered and "'type'" not in rendered and '"type"' not in rendered


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _free_variables(source: str) -> set[str]:
    """Names that a template reads and does not set; none when it does not parse (rendering then says so)."""
    from jinja2 import Environment, TemplateError, meta

    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source)))
    except TemplateError:
        return set()
