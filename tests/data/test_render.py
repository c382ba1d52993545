"""The loss mask is exactly what the target generates, for templates written for these tests and a small real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import CHATML, save_tokenizer
from torchspec.data.conversations import Conversation, RowError
from torchspec.data.render import Renderer, tokenizer_fingerprint
from torchspec.errors import UserError

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}END{% endgeneration %}AFTER\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# history without its thinking, as reasoning models render it
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1].strip() }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}{% if date_string is defined %}{{ date_string }}{% endif %}" + CHATML
DROPS = CHATML.replace("{{ message['content'] }}", "{% if message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}")
STRICT = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('tools are not supported') }}{% endif %}{% endfor %}" + CHATML
NO_END = "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


def tokenizer_with(folder: Path, template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, cut: set[int] | None = None) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(messages=tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)), cut=frozenset(cut or ()))


def supervised(folder: Path, template: str, conversation: Conversation) -> list[str]:
    """The text under each run of the mask."""
    tokenizer = tokenizer_with(folder, template)
    rendered = Renderer(tokenizer, name="tiny").render(conversation)
    assert rendered.ids.shape == rendered.mask.shape
    runs: list[list[int]] = []
    before = 0
    for token, on in zip(rendered.ids.tolist(), rendered.mask.tolist(), strict=True):
        if on:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = on
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def test_answer_and_end_token_and_nothing_else(folder: Path) -> None:
    assert supervised(folder, CHATML, chat("the dog runs", "why not", "because", "we sleep  now")) == ["why not<|im_end|>", "we sleep  now<|im_end|>"]


@pytest.mark.parametrize("words", ["", " leading", "trailing \n", "\n\nnewlines", "émigré 🦜🦜", "a<|im_end|>b", "assistant\nuser", "x" * 300])
def test_awkward_words(folder: Path, words: str) -> None:
    assert "".join(supervised(folder, CHATML, chat("hi", words, "and", "two"))) == f"{words}<|im_end|>two<|im_end|>"


def test_ids_are_those_of_the_whole_text(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, CHATML)
    conversation = chat("the cat", " and the dog", "or", "not")
    whole = tokenizer.apply_chat_template(list(conversation.messages), tokenize=True, return_dict=True)["input_ids"]
    assert Renderer(tokenizer, name="tiny").render(conversation).ids.tolist() == whole


def test_offsets_that_leave_spaces_out(folder: Path) -> None:
    """A byte-level tokenizer that trims offsets shows the newline before an answer as an empty span at the answer's first character."""
    from tokenizers import pre_tokenizers, processors

    tokenizer = tokenizer_with(folder, CHATML)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trimmed = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    trimmed.chat_template = CHATML
    rendered = Renderer(trimmed, name="tiny").render(chat("the dog", "runs over"))
    assert trimmed.decode(rendered.ids[rendered.mask == 1].tolist()) == "runs over<|im_end|>"


def test_a_token_across_the_boundary_is_not_supervised(folder: Path) -> None:
    """Here the generation prompt ends inside what becomes one token with the answer: the target cannot have generated that token."""
    template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nbecau").replace(
        "{{ message['content'] }}", "{% if message['role'] == 'assistant' %}becau{% endif %}{{ message['content'] }}"
    )
    assert supervised(folder, template, chat("why", "se not")) == [" not<|im_end|>"]


def test_an_answer_cut_by_the_length_limit_has_no_end_token(folder: Path) -> None:
    assert supervised(folder, CHATML, chat("hi", "two three", "why", "because it", cut={3})) == ["two three<|im_end|>", "because it"]
    assert supervised(folder, CHATML, chat("hi", "two three ", cut={1})) == ["two three "]


def test_generation_markers_decide_and_their_end_is_mended(folder: Path) -> None:
    conversation = chat("the dog", "runs", "and", "sleeps")
    whole = MARKED.replace("END", "<|im_end|>").replace("AFTER", "")
    without_end = MARKED.replace("END", "").replace("AFTER", "<|im_end|>")
    with_newline = MARKED.replace("END", "<|im_end|>\n").replace("AFTER\n", "")
    for template in (whole, without_end, with_newline):
        assert supervised(folder, template, conversation) == ["runs<|im_end|>", "sleeps<|im_end|>"]
        assert supervised(folder, template, chat("the dog", "runs", cut={1})) == ["runs"]


def test_rewritten_history_is_not_supervised(folder: Path) -> None:
    conversation = chat("one", "<think>it</think> two", "why", "<think>or</think> not")
    assert supervised(folder, THINKING, conversation) == ["<think>or</think> not<|im_end|>"]
    assert supervised(folder, THINKING, chat("one", "two", "why", "not")) == ["two<|im_end|>", "not<|im_end|>"]


def test_a_template_without_end_token_supervises_the_words(folder: Path) -> None:
    assert supervised(folder, NO_END, chat("why", "because")) == ["because"]


def test_the_default_system_prompt_of_the_template_stays_and_none_is_added(folder: Path) -> None:
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}" + CHATML
    ids = Renderer(tokenizer_with(folder, default), name="tiny").render(chat("hi", "ho")).ids.tolist()
    assert tokenizer_with(folder, None).decode(ids).startswith("<|im_start|>system\nbe kind<|im_end|>")
    ids = Renderer(tokenizer_with(folder, CHATML), name="tiny").render(chat("hi", "ho")).ids.tolist()
    assert tokenizer_with(folder, None).decode(ids).startswith("<|im_start|>user")


def test_dates_are_pinned(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, DATED)
    text = tokenizer.decode(Renderer(tokenizer, name="tiny").render(chat("hi", "ho")).ids.tolist())
    assert text.startswith("26 Jul 202426 Jul 2024<|im_start|>")


def test_a_template_that_drops_the_answer_is_said_so(folder: Path) -> None:
    with pytest.raises(RowError, match="drops or rewrites the content of message 1"):
        supervised(folder, DROPS, chat("why", "because"))


def test_a_template_that_refuses_is_quoted(folder: Path) -> None:
    conversation = Conversation(messages=({"role": "user", "content": "x"}, {"role": "tool", "content": "y"}, {"role": "assistant", "content": "z"}))
    with pytest.raises(RowError, match="refused by the target's chat template: tools are not supported"):
        supervised(folder, STRICT, conversation)


def test_a_target_without_chat_template_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.target\.path='tiny' ships no chat template"):
        Renderer(tokenizer_with(folder, None), name="tiny")


def test_the_prompt_is_what_serving_sends(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, CHATML)
    renderer = Renderer(tokenizer, name="tiny")
    conversation = chat("the dog", "runs", "why")
    served = tokenizer.apply_chat_template(list(conversation.messages), tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert renderer.prompt(conversation, 3) == served
    full = renderer.render(chat("the dog", "runs", "why", "because"))
    assert full.ids[: len(served)].tolist() == served and full.mask[len(served)] == 1 and not full.mask[len(served) - 3 : len(served)].any()


def test_the_fingerprint_knows_template_and_vocabulary(folder: Path) -> None:
    first = tokenizer_fingerprint(tokenizer_with(folder, CHATML))
    assert tokenizer_fingerprint(tokenizer_with(folder, CHATML)) == first
    assert tokenizer_fingerprint(tokenizer_with(folder, CHATML + " ")) != first
    grown = tokenizer_with(folder, CHATML)
    grown.add_tokens(["dogcat"])
    assert tokenizer_fingerprint(grown) != first
    assert tokenizer_fingerprint(None) == ""
