"""Clipping inside the optimizer's step against ``clip_grad_norm_`` before it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW

from torchspec.models.optim.clipping import clip


def parameters(scale: float) -> list[torch.nn.Parameter]:
    """Three with gradients, one without."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((7, 5), (33,), (4, 3, 2), (2,))]
    for p in found[:-1]:
        p.grad = torch.randn(p.shape, generator=generator) * scale
    return found


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_equals_clipping_before(kind: type[Adam]) -> None:
    ours, theirs = parameters(1.0), parameters(1.0)
    optimizers = [kind(made, lr=0.1, weight_decay=0.1, fused=True) for made in (ours, theirs)]
    for scale in (1.0, 1e-3, 100.0):  # longer than the limit, shorter, longer
        for made in (ours, theirs):
            for p, fresh in zip(made, parameters(scale), strict=True):
                p.grad = fresh.grad
        norm = clip(optimizers[0], 0.5)
        torch.testing.assert_close(norm, clip_grad_norm_(theirs, 0.5))
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
            if q.grad is not None:  # written back clipped
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    assert not hasattr(optimizers[0], "grad_scale")


def test_the_step_after_is_not_clipped() -> None:
    ours, theirs = parameters(1.0), parameters(1.0)
    optimizer, plain = AdamW(ours, lr=0.1, fused=True), AdamW(theirs, lr=0.1, fused=True)
    clip(optimizer, 0.5)
    optimizer.step()
    clip_grad_norm_(theirs, 0.5)
    plain.step()
    for made in (ours, theirs):
        for p in made[:-1]:
            p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert ours[0].grad is not None and ours[0].grad.eq(3.0).all()


def test_leaves_others_to_lightning() -> None:
    made = parameters(1.0)
    before = [p.grad.clone() for p in made if p.grad is not None]
    for optimizer in (AdamW(made, fused=False), SGD(made), AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True)):
        assert clip(optimizer, 0.1) is None
        assert getattr(optimizer, "grad_scale", None) is None
    scaled = AdamW(made, fused=True)
    scaled.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]  # somebody else's
    assert clip(scaled, 0.1) is None and scaled.grad_scale.item() == 2.0  # type: ignore[attr-defined]
    assert all(torch.equal(p.grad, old) for p, old in zip(made, before, strict=False) if p.grad is not None)


def test_a_step_that_failed_is_clipped_once_when_it_is_repeated() -> None:
    ours, theirs = parameters(1.0), parameters(1.0)
    optimizer, plain = AdamW(ours, lr=0.1, fused=True), AdamW(theirs, lr=0.1, fused=True)

    def fails() -> float:
        raise RuntimeError("out of memory")

    clip(optimizer, 0.5)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    optimizer.register_step_post_hook(lambda *_: None)
    assert clip(optimizer, 0.5) is not None
    optimizer.step()
    clip_grad_norm_(theirs, 0.5)
    plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert not hasattr(optimizer, "grad_scale")
