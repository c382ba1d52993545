"""The requests of ``main.py acceptance``: rows of a conversation file as the token ids that a server is sent.

Every assistant turn is one request (the messages before it), rendered by the target's template as training renders it; rows with only a ``prompt`` are one
request each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torchspec.data.conversations import RowError, parse
from torchspec.data.render import Renderer
from torchspec.data.served import LOOKED_AT, check_served
from torchspec.data.sources import find_sources, read_rows, warn
from torchspec.data.unused import Unused
from torchspec.errors import UserError
from torchspec.target import Target


def read_requests(
    prompts: str,
    target: Target,
    *,
    limit: int | None,
    messages_key: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    written: Sequence[Path] = (),
) -> tuple[list[list[int]], int]:
    """Token ids of each request, and how many rows had none; ``messages_key`` and ``template_args`` as those of training's data.

    What of the rows is not used, and files of a folder that are not read, are said; ``written`` are outputs, which are no input.

    Raises:
        UserError: no such file, no usable row, or a target without a chat template.
    """
    sources, unused = find_sources(prompts, config_key="prompts", written=written), Unused()

    @cache
    def renderer() -> Renderer:  # rows of tokens need none
        return Renderer(target.tokenizer(), name=target.config.path, variables=template_args)

    requests: list[list[int]] = []
    bad, reason = 0, "it is empty"
    for source, text, place in ((one, *row) for one in sources for row in read_rows(one, config_key="prompts")):
        try:
            row = parse(text, messages_key=messages_key, need_answer=False)
            unused.add(source.given, row.unused if row.input_ids is not None else renderer().unused(row))
            if row.input_ids is not None:
                first = (row.loss_mask or []).index(1) if 1 in (row.loss_mask or []) else len(row.input_ids)
                found = [row.input_ids[:first]] if first else []
            else:
                answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
                found = [renderer().prompt(row, i) for i in answers or [len(row.messages)]]
                if len(requests) < LOOKED_AT:
                    check_served(renderer(), target.served, [row], name=target.config.path)
            if (largest := max(map(max, filter(None, found)), default=0)) >= target.vocab_size:
                raise RowError(f"has token {largest}, and the target's vocabulary has {target.vocab_size}")
        except RowError as error:
            bad, reason = bad + 1, f"{source.name}:{place} {error}"
            continue
        requests += found
        if limit is not None and len(requests) >= limit:
            break
    for line in unused.lines("prompts"):
        warn(line)
    if bad and requests:
        warn(f"prompts: {bad} rows cannot be used, the last of them {reason}")
    if not requests:
        raise UserError("prompts", prompts, f"holds no usable prompt ({reason})", 'give rows with "conversations", "messages" or "prompt"')
    return requests[:limit], bad
