"""The tokenizer that is loaded gives the ids that are served: vocabularies in tiktoken's format, slow and fast ones side by side, Mistral's."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import CHATML, save_tokenizer
from torchspec.data.conversations import Conversation
from torchspec.data.render import Renderer
from torchspec.data.served import check_served
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig
from torchspec.tiktoken_files import pattern_in
from torchspec.tokenizer import PROBES, ids_of

SIZES = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "vocab_size": 512}
WHOLE_WORDS = "|".join(
    [r"[\p{Han}]+", r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+(?i:'s|'t|'re)?", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s+(?!\S)", r"\s+"]
)
MERGES = ["it", "'s", "it's", "ha", "hat", " x", "  ", "12", "123"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>"]
CODE = """
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import PreTrainedTokenizer

PARTS = {parts!r}


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "tiktoken.model"}}
    pat_str = "|".join(
        PARTS
    )

    def __init__(self, vocab_file, added_tokens_decoder=None, **kwargs):
        ranks = load_tiktoken_bpe(vocab_file)
        added = {{int(i): str(token) for i, token in added_tokens_decoder.items()}}
        self.special = {{added.get(i, f"<|reserved_token_{{i}}|>"): i for i in range(len(ranks), len(ranks) + 8)}}
        self.model = tiktoken.Encoding("own", pat_str=self.pat_str, mergeable_ranks=ranks, special_tokens=self.special)
        self.table = [self.model.decode_single_token_bytes(i).decode("latin-1") for i in range(self.model.n_vocab)]
        super().__init__(added_tokens_decoder=added_tokens_decoder, **kwargs)

    @property
    def vocab_size(self):
        return self.model.n_vocab

    def get_vocab(self):
        return {{token: i for i, token in enumerate(self.table)}}

    def _tokenize(self, text, **kwargs):
        return [self.table[i] for i in self.model.encode(text, allowed_special="all")]

    def _convert_token_to_id(self, token):
        return self.table.index(token)

    def _convert_id_to_token(self, index):
        return self.table[index]
"""


def tiktoken_target(folder: Path, *, code: str | None = None, trust: bool = False, **described: Any) -> Target:
    """A target with ``tiktoken.model`` and, given, a module with a tokenizer class of its own."""
    folder.mkdir(exist_ok=True)
    ranks = [bytes([i]) for i in range(256)] + [text.encode() for text in MERGES]
    (folder / "tiktoken.model").write_text("\n".join(f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(ranks)))
    added = {str(len(ranks) + 2 * i): {"content": text, "special": text != "<think>"} for i, text in enumerate(SPECIAL)}  # with holes between them
    named: dict[str, Any] = {"added_tokens_decoder": added, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **described}
    if code is not None:
        (folder / "own.py").write_text(code)
        named |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "config.json").write_text(json.dumps(SIZES))
    return Target(TargetConfig(str(folder), trust_remote_code=trust))


def code_with(pattern: str) -> str:
    return CODE.format(parts=pattern.split("|", 1))


def chat(*contents: str) -> Conversation:
    return Conversation(messages=tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)))


def check(target: Target, *conversations: Conversation) -> int:
    return check_served(Renderer(target.tokenizer(), name="tiny"), target.served, conversations, name="tiny")


# -- tiktoken's format


@pytest.mark.parametrize("trust", [True, False], ids=["code runs", "code is read"])
def test_a_tiktoken_vocabulary_is_cut_by_the_shipped_pattern(tmp_path: Path, trust: bool) -> None:
    """Transformers' own conversion cuts ``it's`` in two, whatever the code beside it says."""
    import tiktoken

    target = tiktoken_target(tmp_path / "target", code=code_with(WHOLE_WORDS), trust=trust)
    tokenizer: Any = target.tokenizer()

    ranks = {bytes([i]): i for i in range(256)} | {text.encode(): 256 + i for i, text in enumerate(MERGES)}
    true = tiktoken.Encoding("true", pat_str=WHOLE_WORDS, mergeable_ranks=ranks, special_tokens={text: len(ranks) + 2 * i for i, text in enumerate(SPECIAL)})
    assert tokenizer.is_fast and len(ids_of(tokenizer, "it's")) == 1
    assert target.served is not None and ("OwnTokenizer" in target.served.name) == trust
    for text in (*PROBES, "it's<|im_end|> that's <think> 123", "\x00 \ud7ff x  y"):
        assert ids_of(tokenizer, text) == true.encode(text, allowed_special="all")
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert offsets[-1][1] == len(text)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", CHATML)
    assert not next(token for token in tokenizer.added_tokens_decoder.values() if token.content == "<think>").special
    assert check(target, chat("what's that?", "it's a hat"), Conversation(input_ids=[1, 2], loss_mask=[0, 1])) == 1


def test_code_of_another_transformers_is_read_where_it_does_not_run(tmp_path: Path) -> None:
    broken = "from transformers.models.gone import nothing\n" + code_with(WHOLE_WORDS)
    target = tiktoken_target(tmp_path / "target", code=broken, trust=True)

    assert len(ids_of(target.tokenizer(), "it's")) == 1


def test_a_wrong_fast_conversion_beside_the_code_is_left_for_the_right_one(tmp_path: Path) -> None:
    """tokenizer.json as Transformers would write it: other cuts than the shipped class makes."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path / "target"
    tiktoken_target(folder, code=code_with(WHOLE_WORDS))
    TikTokenConverter(vocab_file=str(folder / "tiktoken.model"), extra_special_tokens=SPECIAL).converted().save(str(folder / "tokenizer.json"))

    for trust in (True, False):
        target = Target(TargetConfig(str(folder), trust_remote_code=trust))
        assert len(ids_of(target.tokenizer(), "it's")) == 1
        assert check(target, chat("it's", "that's it")) == 1


def test_a_kimi_without_its_tokenizer_code_is_refused_where_vllm_would_cut_otherwise(tmp_path: Path) -> None:
    """A copy of the weights without ``tokenization_kimi.py``: no server has that code, and Transformers converts with another pattern."""
    target = tiktoken_target(tmp_path / "target")
    assert check(target, chat("it's", "x")) == 0  # of some other model: what Transformers makes of it is what is served
    (tmp_path / "target" / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": {**SIZES, "model_type": "deepseek_v3"}}))
    target = Target(TargetConfig(str(tmp_path / "target")))
    assert check(target, chat("x", "y")) == 1
    with pytest.raises(UserError, match=r"otherwise than what Transformers makes of tiktoken\.model.*tokenization_\*\.py"):
        check(target, chat("it's", "y"))


def test_code_that_computes_other_ids_than_its_vocabulary_is_refused(tmp_path: Path) -> None:
    """A class that does more than its pattern says: no fast tokenizer agrees, and the data shows it."""
    code = code_with(WHOLE_WORDS).replace("self.model.encode(text,", "self.model.encode(text.replace('hat', 'HAT'),")
    target = tiktoken_target(tmp_path / "target", code=code, trust=True)

    assert check(target, chat("x", "y")) == 1
    with pytest.raises(
        UserError, match=r"cuts '<\|im_start\|>user\\na hat.*otherwise than the target's own OwnTokenizer: from token \d+ on \[.*\] here, \[.*\] there"
    ):
        check(target, chat("x", "y"), chat("a hat", "y"))


def test_a_pattern_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    code = code_with(WHOLE_WORDS).replace("PARTS = [", "PARTS = list(open('x')) or [")
    with pytest.raises(UserError, match="ships code of its own for its tokenizer .*set trust_remote_code to true"):
        tiktoken_target(tmp_path / "target", code=code).tokenizer()
    with pytest.raises(UserError, match="for its tokenizer that does not run with Transformers"):
        tiktoken_target(tmp_path / "target", code="import a_package_that_nobody_has\n", trust=True).tokenizer()


def test_a_broken_vocabulary_is_one_line(tmp_path: Path) -> None:
    target = tiktoken_target(tmp_path / "target", code=code_with(WHOLE_WORDS))
    (tmp_path / "target" / "tiktoken.model").write_text("no rank\nat all here\n")
    with pytest.raises(UserError, match="is no vocabulary in tiktoken's format"):
        target.tokenizer()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("P = 'a' + 'b'\nf(pat_str=P)", "ab"),
        ("class T:\n    pat: str = '|'.join(('a', 'b'))\n    def g(self): f(name=1, pat_str=self.pat)", "a|b"),
        ("f(pat_str='a' f'b')", None),
        ("P = P\nf(pat_str=P)", None),
        ("f(pat_str=g())", None),
        ("f(other='a')", None),
    ],
)
def test_the_pattern_in_source(source: str, expected: str | None) -> None:
    assert pattern_in(source) == expected


# -- a class that builds its pipeline itself, beside a tokenizer.json


def test_a_tokenizer_json_that_its_class_does_not_follow_is_refused_on_the_data(tmp_path: Path) -> None:
    """Transformers 5 builds LlamaTokenizer of the vocabulary alone: of a byte-level vocabulary it is wrong."""
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name, refused in (("LlamaTokenizerFast", True), ("PreTrainedTokenizerFast", False), ("NobodysTokenizer", False), (None, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**described, "tokenizer_class": name} if name else {}))
        target = Target(TargetConfig(str(tmp_path)))
        tokenizer = target.tokenizer()
        tokenizer.chat_template = CHATML
        if refused:
            with pytest.raises(UserError, match=r"otherwise than its tokenizer\.json as it stands.*TokenizersBackend"):
                check(target, chat("What is two and two?", "It is four."))
        else:
            assert check(target, chat("What is two and two?", "It is four.")) == (target.served is not None)


# -- Mistral's


@pytest.fixture
def tekken(tmp_path: Path) -> Iterator[Path]:
    """A target with a small tekken.json alone: bytes, a few merges, the control tokens of its version 3."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    ranks = [bytes([i]) for i in range(256)] + [text.encode() for text in MERGES]
    special = [{"rank": entry["rank"], "token_str": str(entry["token_str"]), "is_control": True} for entry in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    config = {"pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+('s)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+", "num_vocab_tokens": len(ranks), "version": "v3"}
    config |= {"default_vocab_size": len(ranks) + len(special), "default_num_special_tokens": len(special)}
    vocabulary = [{"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for i, token in enumerate(ranks)]
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special}))
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "model_type": "mistral"}))
    yield tmp_path


@pytest.mark.parametrize("consolidated", [False, True], ids=["vLLM asks Transformers", "vLLM takes mistral-common"])
def test_a_target_with_tekken_alone_has_a_tokenizer_and_a_template(tekken: Path, consolidated: bool) -> None:
    if consolidated:
        (tekken / "consolidated.safetensors").touch()
    target = Target(TargetConfig(str(tekken)))
    tokenizer: Any = target.tokenizer()
    conversation = chat("it's 12 hats", "that's  it", "And?", "So.")

    assert tokenizer.is_fast and tokenizer.eos_token == "</s>" and len(ids_of(tokenizer, "it's")) == 1
    assert check(target, conversation) == 1
    renderer = Renderer(tokenizer, name="tiny", end_ids=target.end_ids())
    rendered = renderer.render(conversation)
    assert renderer.decode(rendered.ids[rendered.mask == 1].tolist()) == "that's  it</s>So.</s>"
    assert (target.served is not None and target.served.prompt is not None) == consolidated


def test_tokenizer_json_is_used_beside_tekken(tekken: Path) -> None:
    """Right ids: used, with the folder's own template. Other cuts: refused where vLLM would serve them, mended where it takes mistral-common."""
    target = Target(TargetConfig(str(tekken)))
    right: Any = target.tokenizer()
    right.save_pretrained(tekken)
    (tekken / "chat_template.jinja").write_text(CHATML)

    target = Target(TargetConfig(str(tekken)))
    assert type(target.tokenizer()).__name__ == "TokenizersBackend" and target.tokenizer().chat_template == CHATML
    assert check(target, chat("it's 12", "that's it")) == 1

    stored = json.loads((tekken / "tokenizer.json").read_text())
    stored["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+|\p{N}|[^\p{L}\p{N}]"}
    (tekken / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"otherwise than mistral-common by its tekken\.json: .*fix_mistral_regex"):
        check(Target(TargetConfig(str(tekken))), chat("it's 12", "that's it"))
    (tekken / "consolidated.safetensors").touch()
    target = Target(TargetConfig(str(tekken)))
    assert len(ids_of(target.tokenizer(), "it's")) == 1 and check(target, chat("it's 12", "that's it")) == 1


@pytest.mark.parametrize("consolidated", [False, True])
def test_tokenizer_json_is_used_where_the_configuration_names_mistral_commons_class(tekken: Path, consolidated: bool) -> None:
    """What ``MistralCommonBackend`` saves beside a tokenizer.json: AutoTokenizer then gives that class, which has no offsets."""
    Target(TargetConfig(str(tekken))).tokenizer().save_pretrained(tekken)
    described = json.loads((tekken / "tokenizer_config.json").read_text())
    (tekken / "tokenizer_config.json").write_text(json.dumps({**described, "tokenizer_class": "MistralCommonBackend"}))
    if consolidated:
        (tekken / "consolidated.safetensors").touch()
    target = Target(TargetConfig(str(tekken)))
    assert target.tokenizer().is_fast and check(target, chat("it's 12 hats", "that's  it")) == 1
    assert target.served is not None and target.served.prompt is not None


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    (tmp_path / "chat_template.jinja").unlink()
    for text in ("{}", "{", "[]"):
        (tmp_path / "chat_template.json").write_text(text)
        with pytest.raises(UserError, match=r"has a chat_template\.json without a chat template"):
            Target(TargetConfig(str(tmp_path))).tokenizer()
    for file, text, said in (
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the weights"),
        ("model.safetensors", "x", "is no whole file of safetensors"),
        ("model.safetensors.index.json", "{}", "is no index of safetensors"),
    ):
        (tmp_path / file).write_text(text)
        with pytest.raises(UserError, match=said):
            _ = Target(TargetConfig(str(tmp_path))).stored.shards
        (tmp_path / file).unlink()
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=r"tokenizer\.json' is a pointer of Git LFS, not the tokenizer.*git lfs pull"):
        Target(TargetConfig(str(tmp_path))).tokenizer()


def test_a_target_without_a_template_says_what_to_add(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"ships no chat template .*add chat_template\.jinja") as caught:
        Renderer(Target(TargetConfig(str(tmp_path))).tokenizer(), name="tiny")
    assert "instruction-tuned" not in str(caught.value)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))  # of a processor
    assert Renderer(Target(TargetConfig(str(tmp_path))).tokenizer(), name="tiny").template.source == CHATML
    shutil.rmtree(tmp_path)


# -- vLLM itself


@pytest.mark.slow
def test_ids_are_those_of_vllm(tmp_path: Path, tekken: Path) -> None:
    """What vLLM's own loader gives for the same files."""
    get_tokenizer = pytest.importorskip("vllm.tokenizers.registry").get_tokenizer
    tiktoken_target(tmp_path / "kimi", code=code_with(WHOLE_WORDS))
    save_tokenizer(tmp_path / "fast")
    (tmp_path / "fast" / "config.json").write_text(json.dumps(SIZES))
    both, native = shutil.copytree(tekken, tmp_path / "both", ignore=lambda *_: ["kimi", "fast", "both"]), tmp_path / "native"
    shutil.copytree(both, native)
    Target(TargetConfig(str(both))).tokenizer().save_pretrained(both)
    (native / "consolidated.safetensors").touch()

    for folder, trust in ((tmp_path / "kimi", True), (tmp_path / "fast", False), (both, False), (native, False)):
        ours, theirs = Target(TargetConfig(str(folder), trust_remote_code=trust)).tokenizer(), get_tokenizer(str(folder), trust_remote_code=trust)
        for text in (*PROBES, "it's 123 hats", "that's  it"):
            assert ids_of(ours, text) == theirs.encode(text, add_special_tokens=False), (folder.name, text)
