"""Conversation → token ids and loss mask, by the target's own chat template.

The text is rendered once and tokenised once; the mask is 1 on exactly what the target generates: from where the generation prompt ends to the end-of-turn
token, this one included, the newline that templates put after it not. Boundaries are character positions compared with token offsets; pieces are never
tokenised on their own, because ids change at the seams.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    0                                                     1    1          0

Where the answers are: from the template's generation markers when it has them (``{% generation %}``), else by *prefix rendering*: message i covers what
``render(messages[:i+1])`` has beyond ``render(messages[:i], add_generation_prompt=True)``, provided that the whole conversation shows it that way. A template
that rewrites earlier turns (reasoning models drop their thinking) thus leaves only the turns supervised that the target would have generated as shown.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from torchspec.data.conversations import Conversation, RowError
from torchspec.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PINNED_DATE = datetime(2024, 7, 26)
"""What a template that prints today's date is told, so that the same data renders to the same tokens every day."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """``ids`` [T] int32 and ``mask`` [T] uint8, 1 on what the target generates."""

    ids: np.ndarray
    mask: np.ndarray


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash of vocabulary, merges, special tokens and chat template; "" for none."""
    if tokenizer is None:
        return ""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(backend.to_str().encode() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    digest.update(json.dumps([tokenizer.chat_template, sorted(special_ids(tokenizer))], sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of control tokens: beginnings and ends of turns, padding and the like."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


class Renderer:
    """Renders conversations for one target.

    Args:
        tokenizer: the target's tokenizer.
        name: path or id of the target, for errors.

    Raises:
        UserError: without a chat template, or with a slow tokenizer (which knows no offsets).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "data.target.path",
                name,
                "ships no chat template",
                "take the instruction-tuned variant of the target, or give rows with input_ids and loss_mask",
            )
        if not tokenizer.is_fast:
            raise UserError(
                "data.target.path",
                name,
                "has a slow tokenizer, which gives no token offsets",
                "add a tokenizer.json to the target, or give rows with input_ids and loss_mask",
            )
        self.tokenizer = tokenizer
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else json.dumps(tokenizer.chat_template)
        self._marked = bool(_GENERATION.search(template))
        self._special = np.array(sorted(special_ids(tokenizer)), dtype=np.int64)
        self._pinned: dict[str, Any] = {}
        if "date_string" in template:
            self._pinned["date_string"] = PINNED_DATE.strftime("%d %b %Y")
        if "strftime_now" in template:
            self._pinned["strftime_now"] = PINNED_DATE.strftime

    def prompt(self, conversation: Conversation, upto: int) -> list[int]:
        """Ids that serving sends to get message ``upto``: the messages before it and the generation prompt.

        Raises:
            RowError: when the template refuses them.
        """
        text = self._text(conversation, upto, generate=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text_of(self, ids: list[int]) -> str:
        """The words of generated ids, end token left out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[assignment]
        return text

    def shows_as_generated(self, prompt: list[int], answer: list[int], before: list[dict[str, Any]], text: str, tools: list[dict[str, Any]] | None) -> bool:
        """Whether the conversation with this answer renders to the very ids that were generated after ``prompt``."""
        messages = (*before, {"role": "assistant", "content": text})
        ids = self.tokenizer(self._text(Conversation(messages=messages, tools=tools), len(messages), generate=False), add_special_tokens=False)["input_ids"]
        generated = prompt + answer
        return bool(ids[: len(generated)] == generated)

    def render(self, conversation: Conversation) -> Rendered:
        """Ids and mask of a conversation of messages.

        Raises:
            RowError: when the template refuses the conversation or drops its answers.
        """
        text = self._text(conversation, len(conversation.messages), generate=False)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        starts, ends = _spans(np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2))
        mask = np.zeros(ids.shape[0], dtype=np.uint8)
        for begin, stop, message in self._answers(conversation, text):
            first = int(np.searchsorted(starts, begin, side="left"))
            last = max(first, int(np.searchsorted(ends, stop, side="right")))
            if message in conversation.cut:
                last = min(last, self._end_of_words(ends, text[begin:stop], begin, conversation.messages[message]))
            else:
                last = self._end(ids, ends, first, last, text)
            mask[first:last] = 1
        if not mask.any() and not self._all_empty(conversation):
            raise RowError(self._why_unsupervised(conversation, text))
        return Rendered(ids, mask)

    # -- where the answers are

    def _answers(self, conversation: Conversation, text: str) -> list[tuple[int, int, int]]:
        """(first character, character after the last, message index) of every answer that the text shows as it was generated."""
        indices = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if self._marked:
            spans = self._marked_spans(conversation)
            owners = indices if len(spans) == len(indices) else [-1] * (len(spans) - 1) + indices[-1:]
            return [(b, e, i) for (b, e), i in zip(spans, owners, strict=True) if i < 0 or _shows(text[b:e], conversation.messages[i])]
        found = []
        for i in indices:
            before = self._text(conversation, i, generate=True)
            if not text.startswith(before):
                continue
            upto = text if i == len(conversation.messages) - 1 else self._text(conversation, i + 1, generate=False)
            if upto.startswith(before) and text.startswith(upto) and _shows(upto[len(before) :], conversation.messages[i]):
                found.append((len(before), len(upto), i))
        return found

    def _marked_spans(self, conversation: Conversation) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        try:
            rendered = render(
                conversations=[list(conversation.messages)],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(None, cast(Any, conversation.tools)),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
                **self._pinned,
            )
        except Exception as error:
            raise RowError(f"is refused by the target's chat template: {_first_line(error)}") from None
        return [(int(begin), int(stop)) for begin, stop in rendered[1][0]]

    def _end(self, ids: np.ndarray, ends: np.ndarray, first: int, last: int, text: str) -> int:
        """Index after the last generated token of the answer in ``ids[first:last]``: its end token, found also where a marker stops just before it."""
        special = np.flatnonzero(np.isin(ids[first:last], self._special)) + first
        end = int(special[-1]) if special.size else -1
        if end >= 0 and text[int(ends[end]) : int(ends[last - 1])].strip():
            end = -1  # a control token inside the answer, not at its end
        if end < 0 and self._marked and last < ids.shape[0] and ids[last] in self._special:
            end = last
        if end >= 0:
            return end + 1
        while last > first and not text[int(ends[last - 2]) if last >= 2 else 0 : int(ends[last - 1])].strip():
            last -= 1
        return last

    @staticmethod
    def _end_of_words(ends: np.ndarray, answer: str, begin: int, message: dict[str, Any]) -> int:
        """Index after the last token of the message's own words in an answer that starts at character ``begin``."""
        content: str = message["content"]
        words = content if content in answer else content.strip()
        stop = begin + max(answer.rfind(words), 0) + len(words)
        return int(np.searchsorted(ends, stop, side="right"))

    # -- the template

    def _text(self, conversation: Conversation, upto: int, *, generate: bool) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(  # type: ignore[assignment]
                list(conversation.messages[:upto]), tools=cast(Any, conversation.tools), tokenize=False, add_generation_prompt=generate, **self._pinned
            )
        except Exception as error:  # templates raise whatever their author chose
            raise RowError(f"is refused by the target's chat template: {_first_line(error)}") from None
        return rendered

    def _all_empty(self, conversation: Conversation) -> bool:
        return all(not message["content"].strip() and not message.get("tool_calls") for message in conversation.messages if message["role"] == "assistant")

    def _why_unsupervised(self, conversation: Conversation, text: str) -> str:
        last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
        if not _shows(text, conversation.messages[last]):
            return f"loses its answer: the target's chat template drops or rewrites the content of message {last}"
        return f"shows no answer as the target generates it: its text does not go on from the generation prompt before message {last}"


def _shows(text: str, message: dict[str, Any]) -> bool:
    """Whether a rendered text still has the message's words (what follows its thinking, where templates rearrange that)."""
    words: str = message["content"].split("</think>")[-1].strip()
    return words in text


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _spans(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First character and character after the last of each token, both non-decreasing.

    Tokenizers that trim offsets leave the spaces before a token out of it, and a token of spaces with an empty span; here a token begins where the one
    before it ended. Several tokens of one character (byte-level) share its span.
    """
    ends = np.maximum.accumulate(offsets[:, 1]) if offsets.size else offsets[:, 1]
    before = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    starts = np.minimum(offsets[:, 0], before)
    return np.maximum.accumulate(starts) if offsets.size else starts, ends
