"""Muon beside AdamW: torch's own optimizers are the reference."""

import pytest
import torch
from torch import nn

from torchspec.errors import UserError
from torchspec.models.muon import MuonAdamW, mark_hidden_matrices, orthogonalise


class Toy(nn.Module):
    """A matrix of a layer, wide and tall, a norm of a layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Module()
        layer.wide, layer.tall, layer.norm = nn.Linear(12, 6, bias=False), nn.Linear(6, 12, bias=False), nn.LayerNorm(12, bias=False)
        self.layers = nn.ModuleList([layer])
        self.lm_head = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        layer = self.layers[0]
        return self.lm_head(layer.norm(layer.tall(layer.wide(x).relu())))


def train(model, optimizers, steps=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(4, 12, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def toy():
    torch.manual_seed(0)
    return Toy()


def test_equals_torch_muon_on_matrices_and_torch_adamw_on_the_rest(monkeypatch):
    monkeypatch.setattr("torchspec.models.muon._COEFFICIENTS", ((3.4445, -4.7750, 2.0315),))  # Jordan's, as torch has them
    monkeypatch.setattr("torchspec.models.muon._MARGIN", 1.0)
    monkeypatch.setattr("torchspec.models.muon.working_dtype", lambda dtype, device: dtype)  # torch's Muon iterates in bf16 everywhere
    model = toy()
    mark_hidden_matrices(model)
    ours = train(model, [MuonAdamW(model.parameters(), lr=3e-3, muon_lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, iterations=5)])
    model = toy()
    layer = model.layers[0]
    muon = torch.optim.Muon([layer.wide.weight, layer.tall.weight], lr=0.02, weight_decay=0.1, momentum=0.95)
    adamw = torch.optim.AdamW([layer.norm.weight, model.lm_head.weight], lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1)
    for a, b in zip(ours, train(model, [muon, adamw]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-4)  # bf16 in another memory layout


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.t() @ orthogonalise(matrix).float() @ vt.t()
    diagonal = inside.diagonal()
    assert 0.8 < float(diagonal.min()) and float(diagonal.max()) < 1.3
    assert float((inside - torch.diag(diagonal)).abs().max()) < 0.1


def test_resumes_bit_for_bit(tmp_path):
    model = toy()
    mark_hidden_matrices(model)
    optimizer = MuonAdamW(model.parameters())
    train(model, [optimizer], steps=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    expected = train(model, [optimizer], steps=3)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = toy()
    mark_hidden_matrices(again)
    again.load_state_dict(saved["model"])
    resumed = MuonAdamW(again.parameters())
    resumed.load_state_dict(saved["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(expected, train(again, [resumed], steps=3), strict=True))


def test_attention_alone_leaves_the_mlp_to_adamw():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"self_attn": nn.Linear(4, 4, bias=False), "mlp": nn.Linear(4, 4, bias=False)})])
    mark_hidden_matrices(model)
    groups = {group["kind"]: group["params"] for group in MuonAdamW(model.parameters(), matrices="attention").param_groups}
    assert groups["muon"] == [model.layers[0]["self_attn"].weight] and groups["adamw"] == [model.layers[0]["mlp"].weight]


def test_bad_rates_are_refused():
    with pytest.raises(UserError, match="model.optimizer.momentum"):
        MuonAdamW(toy().parameters(), momentum=1.0)
