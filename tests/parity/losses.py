"""Our losses and those of ``speculators.losses.eager`` at the same logits, value and gradient.

Where definitions agree:

    ours            theirs                     agrees
    forward_kl      kl_div_loss                value but for the target's entropy, which ours leaves in; gradient
    cross_entropy   ce_loss                    where the target's best token is a draft row (ours gives the others no loss)
    reverse_kl      reverse_kl_div_loss        yes
    jsd             js_div_loss                yes
    tv              tv_loss                    whole vocabulary only: under pruning ours takes the target's true probabilities, theirs renormalises
    lk_alpha        neg_log_acceptance_loss    likewise
    lk_lambda       lk_hybrid_loss             whole vocabulary, and for the same lambda: ours comes from the step's mean alpha, theirs from each position's
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models.differences import relative
from torchspec.models.ops.loss_formulas import LossWeights, RowTargets, row_losses

THEIRS = {
    "forward_kl": "kl_div_loss",
    "cross_entropy": "ce_loss",
    "reverse_kl": "reverse_kl_div_loss",
    "jsd": "js_div_loss",
    "tv": "tv_loss",
    "lk_alpha": "neg_log_acceptance_loss",
    "lk_lambda": "lk_hybrid_loss",
}
OWN_UNDER_PRUNING = {"tv", "lk_alpha", "lk_lambda"}
ROWS, V, W = 12, 50, 21


def against_eager(name: str, *, pruned: bool) -> dict[str, float]:
    """Relative differences of ``value`` and ``gradient``, fp32 as theirs computes.

    Args:
        name: of the loss.
        pruned: to ``W`` draft rows; at rows whose most likely token is outside theirs has no rule, so those are left out.
    """
    from speculators.losses import eager

    generator = torch.Generator().manual_seed(0)
    whole = 2 * torch.randn(ROWS * 3 if pruned else ROWS, V, generator=generator)
    ids = torch.randperm(V, generator=generator)[:W].sort().values if pruned else torch.arange(V)
    whole = whole[torch.isin(whole.argmax(-1), ids)]
    full, kept = torch.softmax(whole, -1), whole[:, ids]
    mass = full[:, ids].sum(-1)
    z = 2 * torch.randn(len(whole), len(ids), generator=generator)
    p = torch.softmax(kept, -1)
    alpha = torch.minimum(p, torch.softmax(z, -1)).sum(-1)
    one = torch.ones(len(p))
    target = RowTargets(p, one, p.argmax(-1), one.bool(), mass, one, torch.exp(-3.0 * alpha))
    ours = row_losses(z.clone(), target, LossWeights.of({name: 1.0}), gradient=True, measure=False)

    variable = z[None].clone().requires_grad_()
    function: Callable[..., Any] = getattr(eager, THEIRS[name])
    theirs: Tensor = function(variable, kept[None])[0]
    (gradient,) = torch.autograd.grad(theirs.sum(), variable)
    entropy = -(p * p.log()).sum(-1)
    constant = {"forward_kl": entropy, "lk_lambda": target.mixing * entropy}.get(name, torch.zeros(()))
    assert ours.gradient is not None
    return {"value": relative(ours.loss - constant, theirs), "gradient": relative(ours.gradient, gradient[0])}
