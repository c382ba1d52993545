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
    family: str | None = None,
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
        family: which kind of draft, as model.family; none takes what its config.json says.
        draft_revision: branch, tag or commit of the draft's hub id.
        revision: branch, tag or commit of the target's hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.models.export.export import ExportOptions, export_draft
    from torchspec.models.export.import_draft import import_draft as read
    from torchspec.models.families import family_named

    folder = check_output(Path(home(output)), field="output", reads=Path(home(source)))
    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    draft = read(source, facts, revision=draft_revision, family=None if family is None else family_named(family, field="family"))
    assert draft.family is not None
    options = ExportOptions(form=format, dtype=dtype, max_shard_size=max_shard_size, target_name=target_name)
    rows = "; ".join(f"{name} {value}" for name, value in draft.family.card(draft.config))
    print(f"{source}: {draft.family.title}; {rows}; {draft.config.draft_vocab_size} tokens, aux layers {list(draft.config.aux_layers)}")
    print(export_draft(draft, facts, folder, options=options))
