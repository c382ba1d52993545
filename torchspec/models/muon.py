"""Muon for the matrices of the draft's layers, AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest matrix with orthonormal rows
or columns, so that rare directions of the gradient count as much as frequent ones. A draft learns from it with far fewer tokens. Measured on
SmolLM2-135M (H200; K=4, W=8192, 66k tokens, 155 steps of 512 tokens, start from the target; acceptance length of the serving walk, k=3):

    AdamW, its best learning rate and betas               1.333
    Muon for all matrices, 5 quintic iterations           1.402, 1.393 (two seeds)
    Muon for all matrices, 3 Polar Express iterations     1.394
    Muon for attention alone, 5 quintic iterations        1.390   (a third of the products)
    Muon for the MLP alone, 5 quintic iterations          1.364

``DraftModule`` marks which parameters are such matrices (:func:`mark_hidden_matrices`); embedding, fc, norms and the head are not: their rows or columns are
tokens or separate sources, and Adam's own scale for each entry serves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from torchspec.errors import UserError
from torchspec.hardware import working_dtype

_MARK = "_torchspec_hidden_matrix"
_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""(a, b, c) of x <- a x + b x^3 + c x^5 on singular values, iteration by iteration: Polar Express, the best of its degree for singular values
from 1e-3 to 1 (Amsel et al., arXiv 2505.16932, section 3). The last repeats."""
_MARGIN = 1.01
"""Keeps rounding from lifting a singular value over 1, where the polynomials would blow it up: at the start, and by every iteration."""


def mark_hidden_matrices(module: nn.Module) -> None:
    """Mark the matrices inside ``layers`` as part of attention or MLP; call it when parameters are final (after sharding)."""
    for name, parameter in module.named_parameters():
        if ".layers." in f".{name}" and parameter.ndim == 2:
            setattr(parameter, _MARK, "attention" if ".self_attn." in name else "mlp")


def orthogonalise(matrix: Tensor, *, iterations: int = 5) -> Tensor:
    """A matrix with the same singular vectors and singular values near 1, by Newton-Schulz iterations.

    Args:
        matrix: [m, n].
        iterations: of the quintic polynomial.

    Returns:
        [m, n] in the type that it was computed in (bf16, or fp32 where the device has no bf16 instructions).
    """
    x = matrix.to(working_dtype(torch.bfloat16, matrix.device))
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.t()
    x = x / (_MARGIN * x.norm()).clamp(min=1e-7)
    for i in range(iterations):
        a, b, c = _COEFFICIENTS[min(i, len(_COEFFICIENTS) - 1)]
        a, b, c = a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.t()


class MuonAdamW(torch.optim.Optimizer):
    """See the module. Under fsdp2 each rank gathers a matrix's momentum, orthogonalises it whole and keeps its own shard.

    Args:
        params: parameters; those marked as hidden matrices go to Muon.
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon; a step of a [m, n] matrix has spectral norm ``muon_lr * sqrt(max(1, m/n))``.
        betas, eps: of AdamW.
        weight_decay: of both, decoupled.
        momentum: of Muon (Nesterov).
        iterations: Newton-Schulz iterations.
        matrices: which matrices go to Muon: all, or those of attention alone, for a third of the products.

    Raises:
        UserError: a rate or momentum out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        muon_lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        iterations: int = 5,
        matrices: Literal["all", "attention"] = "all",
    ) -> None:
        for field, value, good in (
            ("lr", lr, lr >= 0),
            ("muon_lr", muon_lr, muon_lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("momentum", momentum, 0 <= momentum < 1),
            ("iterations", iterations, iterations >= 1),
            ("matrices", matrices, matrices in ("all", "attention")),
        ):
            if not good:
                raise UserError(
                    f"model.optimizer.{field}",
                    value,
                    "is out of range",
                    "rates: at least 0; betas, momentum: in [0, 1); iterations: at least 1; matrices: all or attention",
                )
        given = list(params)
        kinds = ("attention", "mlp") if matrices == "all" else ("attention",)
        hidden = [p for p in given if getattr(p, _MARK, None) in kinds]
        others = [p for p in given if getattr(p, _MARK, None) not in kinds]
        common = {"weight_decay": weight_decay}
        groups = [
            {"params": others, "lr": lr, "betas": tuple(betas), "eps": eps, "kind": "adamw", "fused": True, **common},
            {"params": hidden, "lr": muon_lr, "momentum": momentum, "iterations": iterations, "kind": "muon", **common},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # the base class overloads it
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._adamw if group["kind"] == "adamw" else self._muon)(group)
        return loss

    def _adamw(self, group: dict[str, Any]) -> None:
        """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), by torch's own fused kernel."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        if not params:
            return
        state = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [],
            [s["step"] for s in state],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            average = state["momentum"]
            average.lerp_(p.grad, 1 - group["momentum"])
            update = _whole(torch.lerp(p.grad, average, group["momentum"]))
            scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            update = _like(orthogonalise(update, iterations=group["iterations"]), p)
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def _whole(t: Tensor) -> Tensor:
    """A sharded tensor gathered; any other as it is."""
    from torch.distributed.tensor import DTensor

    return t.full_tensor() if isinstance(t, DTensor) else t


def _like(whole: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, sharded and typed as ``p``."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = whole.to(p.dtype)
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else whole
