"""Muon for the matrices of the draft's layers, AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest matrix with orthonormal rows
or columns, so that rare directions of the gradient count as much as frequent ones. A draft learns from it with far fewer tokens. Measured on
SmolLM2-135M (H200; K=4, W=8192, 66k tokens, 155 steps of 512 tokens, start from the target; acceptance length of the serving walk, k=3):

    AdamW, its best learning rate and betas               1.333
    Muon for all matrices, 5 quintic iterations           1.402, 1.393 (two seeds)
    Muon for all matrices, 3 Polar Express iterations     1.394
    Muon for attention alone, 5 quintic iterations        1.390   (a third of the products)
    Muon for the MLP alone, 5 quintic iterations          1.364

``DraftModule`` marks which parameters are such matrices (:func:`mark_hidden_matrices`); embedding, norms and the head
are not: their rows or columns are tokens, and Adam's own scale for each entry serves them. fc, whose columns are
separate sources, is one where ``matrices`` says so.

Weight decay is decoupled (Loshchilov and Hutter, arXiv 1711.05101): a step at rate lr multiplies a weight by 1 - lr x
decay, so a weight forgets what it was over a horizon of 1 / (lr x decay) steps. Give it in shares of the run: at
muon_lr 0.03 a decay of 0.03 is a horizon of 1,100 steps, 45 % of a run of 2,480; one of several runs does nothing.
Norms and biases are exempt inside the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim.adamw import adamw

from torchspec.errors import UserError
from torchspec.hardware import working_dtype

_MARK = "_torchspec_hidden_matrix"
_KINDS = {"attention": ("attention",), "all": ("attention", "mlp"), "layers_and_fc": ("attention", "mlp", "fc")}
"""Which marks each value of ``matrices`` takes."""
_POLAR_EXPRESS = (
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
_JORDAN = ((3.4445, -4.7750, 2.0315),)
"""Of the quintic of Jordan et al., as ``torch.optim.Muon`` has it: singular values end between 0.7 and 1.2, and nothing
blows up."""


def mark_hidden_matrices(module: nn.Module) -> None:
    """Mark the matrices inside ``layers`` as part of attention or MLP, and fc; call it when parameters are final (after
    sharding)."""
    for name, parameter in module.named_parameters():
        if ".layers." in f".{name}" and parameter.ndim == 2:
            setattr(parameter, _MARK, "attention" if ".self_attn." in name else "mlp")
        elif f".{name}".endswith(".fc.weight"):
            setattr(parameter, _MARK, "fc")


def orthogonalise(matrix: Tensor, *, iterations: int = 5, polynomial: Literal["polar_express", "jordan"] = "polar_express") -> Tensor:
    """A matrix with the same singular vectors and singular values near 1, by Newton-Schulz iterations.

    Args:
        matrix: [m, n].
        iterations: of the quintic polynomial.
        polynomial: whose coefficients.

    Returns:
        [m, n] in the type that it was computed in (bf16, or fp32 where the device has no bf16 instructions).
    """
    x = matrix.to(working_dtype(torch.bfloat16, matrix.device))
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.t()
    coefficients, margin = (_POLAR_EXPRESS, _MARGIN) if polynomial == "polar_express" else (_JORDAN, 1.0)
    x = x / (margin * x.norm()).clamp(min=1e-7)
    for i in range(iterations):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        a, b, c = a / margin, b / margin**3, c / margin**5
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.t()


class MuonAdamW(torch.optim.Optimizer):
    """See the module. Under fsdp2 each rank gathers a matrix's momentum, orthogonalises it whole and keeps its own shard.

    Args:
        params: parameters; those marked as hidden matrices go to Muon.
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon.
        betas, eps: of AdamW.
        weight_decay: of AdamW's matrices, decoupled; a horizon of 1 / (lr x weight_decay) steps.
        muon_weight_decay: of Muon's, a horizon of 1 / (muon_lr x muon_weight_decay) steps; None takes ``weight_decay``.
        momentum: of Muon (Nesterov).
        iterations: Newton-Schulz iterations.
        polynomial: of the iterations: Polar Express, or Jordan's, which torch.optim.Muon has.
        matrices: which matrices go to Muon: all of the layers, those of attention alone for a third of the products, or
            all and fc.
        adjust_lr: size of a step of a [m, n] matrix, by torch.optim.Muon's names: ``original`` gives it spectral norm
            muon_lr x sqrt(max(1, m/n)), ``match_rms_adamw`` muon_lr x 0.2 sqrt(max(m, n)), entries as large as AdamW's
            (Liu et al., Moonlight, arXiv 2502.16982).
        decay_vectors: also decay norms and biases, by ``weight_decay``.

    Raises:
        UserError: a rate, decay or momentum out of range.
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
        matrices: Literal["all", "attention", "layers_and_fc"] = "all",
        muon_weight_decay: float | None = None,
        polynomial: Literal["polar_express", "jordan"] = "polar_express",
        adjust_lr: Literal["original", "match_rms_adamw"] = "original",
        decay_vectors: bool = False,
    ) -> None:
        muon_decay = weight_decay if muon_weight_decay is None else muon_weight_decay
        for field, value, good, fix in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("muon_lr", muon_lr, muon_lr >= 0, "at least 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "numbers of at least 0 and below 1"),
            ("weight_decay", weight_decay, 0 <= weight_decay * lr < 1, "at least 0, and below 1 / lr"),
            ("muon_weight_decay", muon_decay, 0 <= muon_decay * muon_lr < 1, "at least 0, and below 1 / muon_lr"),
            ("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1"),
            ("iterations", iterations, iterations >= 1, "at least 1"),
            ("matrices", matrices, matrices in _KINDS, " or ".join(_KINDS)),
            ("polynomial", polynomial, polynomial in ("polar_express", "jordan"), "polar_express or jordan"),
            ("adjust_lr", adjust_lr, adjust_lr in ("original", "match_rms_adamw"), "original or match_rms_adamw"),
        ):
            if not good:
                raise UserError(f"model.optimizer.{field}", value, "is out of range", f"use {fix}")
        given = list(params)
        hidden = [p for p in given if getattr(p, _MARK, None) in _KINDS[matrices]]
        others = [p for p in given if getattr(p, _MARK, None) not in _KINDS[matrices]]
        self.matrices, self.polynomial, self.adjust_lr, self.decay_vectors = matrices, polynomial, adjust_lr, decay_vectors
        groups = [
            {"params": others, "lr": lr, "betas": tuple(betas), "eps": eps, "kind": "adamw", "fused": True, "weight_decay": weight_decay},
            {"params": hidden, "lr": muon_lr, "momentum": momentum, "iterations": iterations, "kind": "muon", "weight_decay": muon_decay},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @property
    def settings(self) -> dict[str, Any]:
        """What a group does not say, where it is not the default: for the recipe. (A new key of a group would make
        older sharded checkpoints unreadable.)"""
        said = {"matrices": self.matrices, "polynomial": self.polynomial, "adjust_lr": self.adjust_lr, "decay_vectors": self.decay_vectors}
        return {name: value for name, value in said.items() if value not in ("all", "polar_express", "original", False)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("weight_decay", 0.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's: settings of the saved groups stand. Says so where this run asks for others."""
        asked = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, wanted in zip(self.param_groups, asked, strict=True):
            for name in sorted(wanted.keys() - {"params", "lr", "initial_lr", "fused"}):
                saved = group.get(name)
                if saved != wanted[name] and not (isinstance(saved, list | tuple) and list(saved) == list(wanted[name])):
                    rank_zero_warn(f"{group['kind']} goes on with the checkpoint's {name} {saved}, not {wanted[name]}: start_from begins a run with another")

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
        """By torch's own fused kernel, once for what decays and once for what does not."""
        given = [p for p in group["params"] if p.grad is not None]
        for p in given:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        decay = group["weight_decay"]
        if not decay or self.decay_vectors:
            self._adamw_on(given, group, decay)
            return
        self._adamw_on([p for p in given if p.ndim > 1], group, decay)
        self._adamw_on([p for p in given if p.ndim <= 1], group, 0.0)

    def _adamw_on(self, params: list[Tensor], group: dict[str, Any], decay: float) -> None:
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
            weight_decay=decay,
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
            rows, columns = update.shape
            scale = max(1.0, rows / columns) ** 0.5 if self.adjust_lr == "original" else 0.2 * max(rows, columns) ** 0.5
            update = _like(orthogonalise(update, iterations=group["iterations"], polynomial=self.polynomial), p)
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
