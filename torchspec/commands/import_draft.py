"""``main.py import_draft``: a published draft is read, checked and written in another format (``models/export/import_draft.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torchspec.folders import check_output
from torchspec.paths import home
from torchspec.target import Dtype, Target, TargetConfig


def import_draft(
    source: str,
    target: str,
    output: str,
    format: Literal["vllm", "speculators", "sglang"] = "vllm",
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
    target_name: str | None = None,
    draft_revision: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Read a published draft, check every tensor, and write it in another format; model.start_from trains on from either.

    Args:
        source: directory, file of weights (its config.json beside it) or hub id of the draft.
        target: hub id or directory of the target that it drafts for.
        output: directory to write; an earlier export there is replaced, anything else is left alone.
        format: vllm, speculators or sglang.
        dtype: type of the tensors; auto takes the target's.
        max_shard_size: largest file; a bigger draft is written in shards.
        target_name: hub id to name the target by, where it is a local copy.
        draft_revision: branch, tag or commit of the draft's hub id.
        revision: branch, tag or commit of the target's hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.models.export.export import ExportOptions, export_draft
    from torchspec.models.export.import_draft import complete
    from torchspec.models.export.import_draft import import_draft as read

    folder = check_output(Path(home(output)), field="output", reads=Path(home(source)))
    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    draft = read(source, facts, revision=draft_revision)
    options = ExportOptions(form=format, dtype=dtype, max_shard_size=max_shard_size, target_name=target_name)
    config = draft.config
    print(f"{source}: {config.num_layers} layer(s), hidden size {config.hidden_size}, {config.draft_vocab_size} tokens, aux layers {list(config.aux_layers)}")
    print(export_draft(config, complete(draft, facts), draft.vocabulary, facts, folder, options=options))
