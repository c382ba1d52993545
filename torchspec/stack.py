"""Where a decoder's blocks and its final norm stand in a Transformers model: one rule for who reads states and for who
reads weights.

The two must mean the same norm: an engine's last state is what enters it, and the teacher's head begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torchspec.errors import UserError


@dataclass(frozen=True)
class Stack:
    """The text decoder of a model."""

    owner: nn.Module
    """Its forward runs the blocks."""
    owner_name: str
    blocks: nn.ModuleList
    norm: nn.Module
    """Enters after the last block."""
    norm_name: str
    """From the model's root."""


def text_stack(model: nn.Module, *, num_layers: int) -> Stack:
    """The stack of ``num_layers`` blocks that the token embedding feeds.

    Of several lists of that length (a vision tower may have as many blocks, a mixture as many experts), it is the one
    that shares the longest path with the token embedding, of those the one that stands highest, and of those the one
    with the most weights.

    Args:
        model: of Transformers, on any device.
        num_layers: L of the target's configuration.

    Raises:
        UserError: no such list, or no norm beside it.
    """
    embedding = _path_of(model, _embedding(model))

    def rank(item: tuple[str, nn.Module, nn.ModuleList]) -> tuple[int, int, int]:
        path = item[0].split(".") if item[0] else []
        shared = 0
        for ours, theirs in zip(path, embedding, strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared, -len(path), sum(p.numel() for p in item[2].parameters())

    found = [
        (name, owner, child)
        for name, owner in model.named_modules()
        for child in owner.children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if not found:
        raise UserError("data.target.path", type(model).__name__, f"has no list of {num_layers} blocks that we can find", "report this architecture")
    owner_name, owner, blocks = max(found, key=rank)
    short, norm = _final_norm(owner, blocks)
    return Stack(owner, owner_name, blocks, norm, f"{owner_name}.{short}" if owner_name else short)


def _embedding(model: nn.Module) -> nn.Module | None:
    ask = getattr(model, "get_input_embeddings", None)
    try:
        return ask() if ask is not None else None
    except (NotImplementedError, AttributeError):
        return None


def _path_of(model: nn.Module, wanted: nn.Module | None) -> list[str]:
    return next((name.split(".") for name, module in model.named_modules() if module is wanted), [])


def _final_norm(owner: nn.Module, blocks: nn.ModuleList) -> tuple[str, nn.Module]:
    """The norm among the children of the stack's owner: the first one after the blocks, else one that is named
    final."""
    children = list(owner.named_children())
    after = next(i for i, (_, child) in enumerate(children) if child is blocks)

    def is_norm(module: nn.Module) -> bool:
        return "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in module.parameters())

    late = [(name, child) for name, child in children[after + 1 :] if is_norm(child) and name != "layernorm_embedding"]  # BART's, of the embedding
    early = [(name, child) for name, child in children[:after] if is_norm(child) and "final" in name]
    for pair in late + early:
        return pair
    problem = "has no final norm beside its blocks that we can find"
    raise UserError("data.target.path", type(owner).__name__, problem, "report this architecture")
