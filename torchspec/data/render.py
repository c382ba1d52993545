"""Conversation → token ids and loss mask, by the target's own chat template.

The text is rendered and tokenised once; the mask is 1 on exactly what the target generates: from where the generation
prompt ends to the end-of-turn token, this one included, the newline that templates put after it not. Boundaries are
character positions (``answer_spans.py``) compared with token offsets; pieces are never tokenised on their own, because
ids change at the seams.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    0                                                     1    1          0
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from torchspec.data.answer_spans import SUPERVISE, AnswerFinder, Span, shows
from torchspec.data.conversations import Conversation, Message, RowError, reasoning_of, words_of
from torchspec.data.template import ChatTemplate
from torchspec.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        end_ids: tokens that end what the target generates; the tokenizer's own is one in any case.
        supervise: auto, all or last (``answers.SUPERVISE``).
        variables: given to the template as they are.

    Raises:
        UserError: without a chat template, or with a slow tokenizer (which knows no offsets).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        end_ids: Sequence[int] = (),
        supervise: str = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if supervise not in SUPERVISE:
            raise UserError("data.supervise", supervise, "is unknown", f"use one of {', '.join(SUPERVISE)}")
        self.template = ChatTemplate(tokenizer, name=name, variables=variables)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "data.target.path",
                name,
                "has a slow tokenizer, which gives no token offsets",
                "add a tokenizer.json to the target, or give rows with input_ids and loss_mask",
            )
        self.tokenizer = tokenizer
        self.supervise = supervise
        special = special_ids(tokenizer)
        self._special = special
        ends = {i for i in (*end_ids, tokenizer.eos_token_id) if isinstance(i, int)}
        self._ends = frozenset(ends & special)
        texts = {int(i): str(tokenizer.convert_ids_to_tokens(int(i))) for i in special}
        self._finder = AnswerFinder(self.template, special=texts, end_ids=self._ends)

    def prompt(self, conversation: Conversation, upto: int) -> list[int]:
        """Ids that serving sends to get message ``upto``: the messages before it and the generation prompt.

        Raises:
            RowError: when the template refuses them.
        """
        before = replace(conversation, messages=conversation.messages[:upto])
        return self._encode(self.template.text(before.messages, before.tools, generate=True, variables=self.template.variables(before)))

    def asked(self, conversation: Conversation) -> list[int]:
        """Indices of the answers, which are what :meth:`prompt` can ask for; the end where there is none."""
        return [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"] or [len(conversation.messages)]

    def text(self, conversation: Conversation) -> str:
        """The whole conversation as it is tokenised.

        Raises:
            RowError: when the template refuses it.
        """
        if conversation.text is not None:
            return conversation.text
        if not any(message["role"] == "assistant" for message in conversation.messages):
            return self.template.text(conversation.messages, conversation.tools, generate=True, variables=self.template.variables(conversation))
        return self._finder.find(conversation, supervise=self.supervise)[0]

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered text."""
        return self._encode(text)

    def unused(self, conversation: Conversation) -> tuple[str, ...]:
        """Keys of the row that nothing is read from, those that the chat template ignores among them."""
        return conversation.unused if conversation.text is not None else (*conversation.unused, *self.template.ignored(conversation))

    def text_of(self, ids: list[int]) -> str:
        """The words of generated ids, end token left out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[assignment]
        return text

    def decode(self, ids: list[int]) -> str:
        """Ids as text, control tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[assignment]
        return text

    def ends(self, token: int) -> bool:
        """Whether a token ends what the target generates."""
        return token in self._ends

    def has_control(self, text: str) -> bool:
        """Whether text holds a control token."""
        return self._finder.control.search(text) is not None

    def before_control(self, text: str) -> str:
        """Text up to its first control token."""
        match = self._finder.control.search(text)
        return text if match is None else text[: match.start()]

    def shown(self, conversation: Conversation) -> str | None:
        """The last answer as it is generated, end token included; None where the template does not show it so."""
        try:
            text, spans = self._finder.find(conversation, supervise="last")
        except RowError:
            return None
        return text[spans[-1].begin : spans[-1].stop] if spans else None

    def render(self, conversation: Conversation) -> Rendered:
        """Ids and mask of a conversation of messages, or of text. Answers that the row marks as context are not
        supervised.

        Raises:
            RowError: when the template refuses the conversation or drops its answers.
        """
        if conversation.text is not None:
            text = conversation.text
            spans = self._finder.find_in(text, supervise=self.supervise)
        else:
            text, spans = self._finder.find(conversation, supervise=self.supervise)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        starts, ends = _spans(np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2))
        mask = np.zeros(ids.shape[0], dtype=np.uint8)
        for span in spans:
            if span.message in conversation.context:
                continue
            first = int(np.searchsorted(starts, span.begin, side="left"))
            last = max(first, int(np.searchsorted(ends, span.stop, side="right")))
            last = self._end(ids, starts, ends, first, last, text, span)
            if span.message in conversation.cut:
                last = self._end_of_words(ids, ends, first, last, text[span.begin :], span.begin, conversation.messages[span.message])
            mask[first:last] = 1
        if not mask.any() and not _nothing_to_train(conversation, spans):
            raise RowError(self._why_unsupervised(conversation, text))
        return Rendered(ids, mask)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _end(self, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, first: int, last: int, text: str, span: Span) -> int:
        """Index after the last generated token of the answer in ``ids[first:last]``: its end token, also where that
        stands just behind the span.
        """
        tail = last  # of control tokens and whitespace
        while tail > first and (int(ids[tail - 1]) in self._special or not text[int(starts[tail - 1]) : int(ends[tail - 1])].strip()):
            tail -= 1
        controls = [i for i in range(tail, last) if int(ids[i]) in self._special]
        for i in controls:
            if int(ids[i]) in self._ends:
                return i + 1
        if last < ids.shape[0] and int(ids[last]) in (self._special if self.template.marked and not span.generated and not controls else self._ends):
            return last + 1
        return controls[-1] + 1 if controls else tail

    def _end_of_words(self, ids: np.ndarray, ends: np.ndarray, first: int, last: int, answer: str, begin: int, message: Message) -> int:
        """Index after the last token of an answer that a length limit cut, in ``ids[first:last]``: its call, its words,
        or the thinking that it was at.
        """
        while last > first and int(ids[last - 1]) in self._ends:
            last -= 1
        if message.get("tool_calls") or last == first:
            return last
        words, thought, answer = words_of(message), reasoning_of(message), answer[: int(ends[last - 1]) - begin]
        said = [one for one in (words, words.strip(), words.split("</think>")[-1].strip(), thought, thought.strip()) if one.strip()]
        shown = next((one for one in said if one in answer), answer if said else "")
        return min(last, int(np.searchsorted(ends, begin + answer.rfind(shown) + len(shown), side="right"))) if shown else first

    def _why_unsupervised(self, conversation: Conversation, text: str) -> str:
        if conversation.text is not None:
            return "text has only empty answers"
        last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
        if not shows(text, {**conversation.messages[last], "reasoning_content": None}):
            return f"loses its answer: the target's chat template drops or rewrites the content of message {last}"
        if not shows(text, conversation.messages[last]):
            return f"loses its thinking: the target's chat template drops or rewrites the reasoning of message {last}"
        return f"shows no answer as the target generates it: its text does not go on from the generation prompt before message {last}"


def _nothing_to_train(conversation: Conversation, spans: Sequence[Span]) -> bool:
    """Whether it is the row itself that leaves nothing: its answers are empty, or context only where they are shown as
    generated.
    """
    answers = [(i, message) for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if any(span.message in conversation.context for span in spans) or (answers and all(i in conversation.context for i, _ in answers)):
        return True
    return bool(answers) and all(not words_of(message).strip() and not message.get("tool_calls") for _, message in answers)


def _spans(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First character and character after the last of each token, both non-decreasing.

    Tokenizers that trim offsets leave the spaces before a token out of it, and a token of spaces with an empty span;
    here a token begins where the one before it ended. Several tokens of one character (byte-level) share its span.
    """
    ends = np.maximum.accumulate(offsets[:, 1]) if offsets.size else offsets[:, 1]
    before = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    starts = np.minimum(offsets[:, 0], before)
    return np.maximum.accumulate(starts) if offsets.size else starts, ends
