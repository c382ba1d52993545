"""Tokenizers with habits: normalisers that change text, prefix spaces, tokens of their own before and after, lists of templates. The mask must not move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, save_tokenizer
from torchspec.data.conversations import Conversation
from torchspec.data.render import Renderer
from torchspec.target import Target, TargetConfig
from torchspec.tokenizer import ids_of

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "vocab_size": 512}
SAID = "  Ångström e\u0301te\u0301 ﬁne — DON'T 你好 🙂 end "
ASKED = "Wha\u0301t  ISTANBUL İ?"


def saved(folder: Path, backend: Tokenizer, **more: Any) -> Target:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"], show_progress=False)
    backend.train_from_iterator([SAID, ASKED, "user assistant"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>", **more)
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Target(TargetConfig(str(folder)))


def byte_level(*, prefix: bool = False, trim: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return backend


def metaspace(*, fallback: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # of Llama 2
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def with_normalizer(*steps: Any) -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence(list(steps))
    return backend


BACKENDS = {
    "byte level": byte_level,
    "prefix space": lambda: byte_level(prefix=True),
    "prefix space, trimmed offsets": lambda: byte_level(prefix=True, trim=True),
    "NFC": lambda: with_normalizer(normalizers.NFC()),
    "NFKC, lower case": lambda: with_normalizer(normalizers.NFKC(), normalizers.Lowercase()),
    "accents stripped": lambda: with_normalizer(normalizers.NFD(), normalizers.StripAccents()),
    "Llama 2": lambda: metaspace(fallback=False),
    "Llama 2, bytes": lambda: metaspace(fallback=True),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_mask_is_the_answer_whatever_a_tokenizer_does_to_text(tmp_path: Path, name: str) -> None:
    """From the first token behind the header to the end token, with nothing of the question under it."""
    target = saved(tmp_path, BACKENDS[name]())
    tokenizer: Any = target.tokenizer()
    renderer = Renderer(tokenizer, name="odd", end_ids=target.end_ids())
    messages = ({"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}) * 2
    rendered = renderer.render(Conversation(messages=messages))

    text = renderer.text(Conversation(messages=messages))
    assert rendered.ids.tolist() == ids_of(tokenizer, text)
    on = rendered.mask.tolist()
    runs = [i for i in range(1, len(on)) if on[i] and not on[i - 1]]
    ends = [i for i in range(len(on)) if on[i] and (i + 1 == len(on) or not on[i + 1])]
    assert len(runs) == len(ends) == 2
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    header, stop = "<|im_start|>assistant\n", "<|im_end|>"
    at = 0
    for first, last in zip(runs, ends, strict=True):
        begin = text.index(header, at) + len(header)
        at = text.index(stop, begin)
        assert rendered.ids[last] == tokenizer.eos_token_id
        assert abs(offsets[first][0] - begin) <= 2 and offsets[first - 1][1] <= begin  # spaces before a trimmed token
        assert offsets[last][1] == at + len(stop)


@pytest.mark.parametrize("adds", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_a_tokenizer_that_adds_tokens_adds_none_to_rendered_text(tmp_path: Path, adds: dict[str, bool]) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**described, **adds, "model_max_length": 4, "clean_up_tokenization_spaces": True}))
    target = Target(TargetConfig(str(tmp_path)))
    renderer = Renderer(target.tokenizer(), name="tiny", end_ids=target.end_ids())
    conversation = Conversation(messages=({"role": "user", "content": "What is it ?"}, {"role": "assistant", "content": "It is two , I say ."}))

    ids = renderer.render(conversation).ids.tolist()
    assert ids.count(target.tokenizer().bos_token_id) == 2 and ids[:1] != ids[1:2]
    assert renderer.decode(ids) == renderer.text(conversation)
    assert renderer.prompt(conversation, 1) == ids[: len(renderer.prompt(conversation, 1))]


def test_templates_given_as_a_list_are_looked_into(tmp_path: Path) -> None:
    """The switch for thinking stands in one of them; texts come from the one that Transformers and vLLM choose."""
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "chat_template.jinja").unlink()
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    switched = "{% if enable_thinking %}<think>{% endif %}" + CHATML.replace('"', "'")
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": switched}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**described, "chat_template": templates}))
    template = Renderer(Target(TargetConfig(str(tmp_path))).tokenizer(), name="tiny").template

    answered = Conversation(messages=({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}))
    assert template.variables(answered)["enable_thinking"] is False
    tools = [{"type": "function", "function": {"name": "x", "description": "", "parameters": {"type": "object", "properties": {}}}}]
    asked: Any = [{"role": "user", "content": "x"}]
    assert template.text(asked, tools, generate=True, variables={"enable_thinking": True}).startswith("<think>")
    assert not template.text(asked, None, generate=True, variables={"enable_thinking": True}).startswith("<think>")
