"""``main.py export``: a training checkpoint becomes a draft directory for a server (``models/export/export.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torchspec.errors import UserError
from torchspec.folders import check_output
from torchspec.paths import home
from torchspec.target import Dtype, Target, TargetConfig


def export(
    checkpoint: str,
    target: str,
    output: str,
    format: Literal["vllm", "speculators", "sglang"] = "vllm",
    dtype: Dtype = "auto",
    draft_vocab_size: int | None = None,
    token_counts: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: bool = False,
    target_name: str | None = None,
    weights: Literal["raw", "average"] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Turn a training checkpoint into a draft directory that a server reads.

    Args:
        checkpoint: a .ckpt file, or the folder of a sharded one.
        target: hub id or directory of the target that the draft was trained for.
        output: directory to write; an earlier export there is replaced, anything else is left alone.
        format: vllm, speculators or sglang; a draft that the format's server would run wrongly is refused.
        dtype: type of the tensors; auto takes the target's.
        draft_vocab_size: cut a draft of the whole vocabulary to so many tokens; needs token_counts.
        token_counts: what decides which tokens stay: conversation file, folder or hub id whose answers are counted, or the .safetensors file that
            `vocabulary` wrote.
        max_shard_size: largest file; a bigger draft is written in shards.
        tokenizer: also write the target's tokenizer and generation settings.
        target_name: hub id to name the target by, where it is a local copy.
        weights: of a checkpoint of a run with torchspec.callbacks.average.Average, the weights in training (raw) or
            their average; none takes the average where there is one.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.models.export.export import ExportOptions, export_checkpoint

    if (draft_vocab_size is None) != (token_counts is None):
        raise UserError("draft_vocab_size", draft_vocab_size, f"goes with token_counts={token_counts}", "give both or none")
    folder = check_output(Path(home(output)), field="output", reads=Path(home(checkpoint)))
    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    vocabulary = None
    if draft_vocab_size is not None and token_counts is not None:
        from torchspec.data.corpus import count_tokens
        from torchspec.models.vocabulary import VocabularyMapping

        counts, ends = count_tokens(facts, token_counts)
        vocabulary = VocabularyMapping.from_counts(counts, draft_vocab_size, always=ends)
        share = vocabulary.coverage(counts)
        print(f"draft vocabulary: {draft_vocab_size} of {facts.vocab_size} tokens, covering {share:.2%} of the supervised tokens of {token_counts}")
    options = ExportOptions(form=format, dtype=dtype, max_shard_size=max_shard_size, tokenizer=tokenizer, target_name=target_name, weights=weights)
    print(export_checkpoint(Path(home(checkpoint)), facts, folder, options=options, vocabulary=vocabulary))
