"""Vocabularies in tiktoken's format: ranks in a file, and the pattern that cuts text into words in the code that ships with them.

Transformers converts the ranks, with the pattern of GPT-4 for all of them; Kimi's cuts otherwise (``it's`` is one word of it, three of GPT-4's). Here the
pattern is that of the shipped class: of the running tokenizer where its code may run, else read from its source.
"""

from __future__ import annotations

import ast
import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchspec.errors import UserError

_FILE = "tiktoken.model"
_KIMI = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Pattern of Moonshot's ``tokenization_kimi.py``, for copies of its models that lost that file."""


@dataclass(frozen=True)
class Encoding:
    """A tokenizer as tiktoken describes it."""

    pattern: str
    ranks: dict[bytes, int]
    added: dict[str, tuple[int, bool]]
    """Id of each added token, and whether it is a control token."""
    origin: str
    """Where the pattern is from, for errors."""

    @cached_property
    def _model(self) -> Any:
        import tiktoken

        return tiktoken.Encoding("target", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={text: i for text, (i, _) in self.added.items()})

    def encode(self, text: str) -> list[int]:
        """Ids by tiktoken itself, added tokens taken as such."""
        ids: list[int] = self._model.encode(text, allowed_special="all")
        return ids


def running_encoding(tokenizer: Any) -> Encoding | None:
    """What a slow tokenizer object encodes with; None where that is no tiktoken."""
    try:
        import tiktoken
    except ImportError:
        return None
    found = next((value for value in vars(tokenizer).values() if isinstance(value, tiktoken.Encoding)), None)
    if found is None:
        return None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    known = set(tokenizer.added_tokens_decoder)
    added = {text: (i, i in special or i not in known) for text, i in found._special_tokens.items()}
    return Encoding(found._pat_str, dict(found._mergeable_ranks), added, f"its {type(tokenizer).__name__}")


def read_encoding(folder: Path, described: dict[str, Any], reference: str | None) -> Encoding | None:
    """The encoding of a folder with ``tiktoken.model``, its pattern read from the source of the shipped class without running it.

    Args:
        folder: of the tokenizer's files.
        described: tokenizer_config.json.
        reference: ``module.Class`` of the shipped class; None where none is shipped.

    Returns:
        None where there is no such file, or no pattern is found.
    """
    if not (folder / _FILE).is_file():
        return None
    pattern, origin = None, ""
    if reference is not None:
        origin = reference.split("--")[-1].rpartition(".")[0] + ".py"
        pattern = pattern_in((folder / origin).read_text()) if (folder / origin).is_file() else None
    elif is_known(folder):
        pattern, origin = _KIMI, "Kimi's published tokenizer"
    if pattern is None:
        return None
    added = {str(token["content"]): (int(i), bool(token.get("special"))) for i, token in (described.get("added_tokens_decoder") or {}).items()}
    return Encoding(pattern, read_ranks(folder / _FILE), added, origin)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes and their ranks, of a file of lines ``BASE64 RANK``.

    Raises:
        UserError: it holds something else.
    """
    try:
        pairs = [line.split() for line in file.read_text().splitlines() if line.strip()]
        return {base64.b64decode(token): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise UserError("data.target.path", str(file), f"is no vocabulary in tiktoken's format ({error})", "copy the file from the target anew") from error


def pattern_in(source: str) -> str | None:
    """The value that Python source passes as ``pat_str``, where that is text put together from constants; None where it is not.

    >>> pattern_in('class T:\\n    pat_str = "|".join(["a", "b"])\\n    def __init__(self): self.m = Encoding(pat_str=self.pat_str)')
    'a|b'
    """
    tree = ast.parse(source)
    values: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            values |= {_name(target): node.value for target in node.targets}
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            values[_name(node.target)] = node.value
    passed = (word.value for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords if word.arg == "pat_str")
    return next((text for value in passed if (text := _text(value, values, depth=8)) is not None), None)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.expr, values: dict[str, ast.expr], *, depth: int) -> str | None:
    """The text that an expression of constants, names, sums and joins stands for."""
    if depth == 0:
        return None

    def of(inner: ast.expr) -> str | None:
        return _text(inner, values, depth=depth - 1)

    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [of(node.left), of(node.right)]
        return None if None in parts else "".join(map(str, parts))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join" and len(node.args) == 1:
        between, listed = of(node.func.value), node.args[0]
        listed = values.get(_name(listed), listed)
        parts = [of(part) for part in listed.elts] if isinstance(listed, ast.List | ast.Tuple) else [None]
        return None if between is None or None in parts else between.join(map(str, parts))
    return of(values[_name(node)]) if _name(node) in values else None


def fast_of(encoding: Encoding) -> Any:
    """``tokenizers.Tokenizer`` with the same ids.

    Ids between the ranks and the highest added token that nothing has are given to reserved tokens, since that library numbers added tokens in a row.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = byte_characters()
    vocabulary = {_shown(token, characters): rank for token, rank in encoding.ranks.items()}
    merges = [(_shown(left, characters), _shown(right, characters)) for left, right in merges_of(encoding.ranks)]
    fast = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    by_id = {index: (text, special) for text, (index, special) in encoding.added.items()}
    for index in range(len(vocabulary), max(by_id, default=-1) + 1):
        text, special = by_id.get(index, (f"<|reserved_token_{index}|>", True))
        token = AddedToken(text, normalized=False, special=special)
        _ = fast.add_special_tokens([token]) if special else fast.add_tokens([token])
    return fast


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs that merge, the first to merge first: tiktoken joins whichever neighbours have the lowest rank together."""
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _shown(token: bytes, characters: dict[int, str]) -> str:
    return "".join(characters[byte] for byte in token)


def is_known(folder: Path) -> bool:
    """Whether a folder has ``tiktoken.model`` of a model whose pattern is known here."""
    if not ((folder / _FILE).is_file() and (folder / "config.json").is_file()):
        return False
    return str(json.loads((folder / "config.json").read_text()).get("model_type")).startswith("kimi_")
