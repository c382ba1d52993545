"""Muon beside AdamW: torch's own optimizers are the reference."""

import pytest
import torch
from torch import nn

from torchspec.errors import UserError
from torchspec.models.optim.muon import MuonAdamW, mark_hidden_matrices, orthogonalise


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


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_equals_torch_muon_on_matrices_and_torch_adamw_on_the_rest(monkeypatch, adjust_lr):
    monkeypatch.setattr("torchspec.models.optim.muon.working_dtype", lambda dtype, device: dtype)  # torch's Muon iterates in bf16 everywhere
    model = toy()
    mark_hidden_matrices(model)
    rates = {"lr": 3e-3, "muon_lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1, "muon_weight_decay": 0.3}
    ours = train(model, [MuonAdamW(model.parameters(), **rates, polynomial="jordan", adjust_lr=adjust_lr)])
    model = toy()
    layer = model.layers[0]
    muon = torch.optim.Muon([layer.wide.weight, layer.tall.weight], lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn=adjust_lr)
    groups = [{"params": [layer.norm.weight], "weight_decay": 0.0}, {"params": [model.lm_head.weight], "weight_decay": 0.1}]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95))
    for a, b in zip(ours, train(model, [muon, adamw]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-4)  # bf16 in another memory layout


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("decay_vectors", [False, True])
def test_decay_is_torchs_own_bit_for_bit_and_spares_vectors(decay_vectors):
    """AdamW's part with gradients; Muon's alone, with a gradient of zero, whose step is nothing but the decay."""
    ours, theirs = toy(), toy()
    mark_hidden_matrices(ours)
    optimizer = MuonAdamW(ours.parameters(), lr=3e-3, muon_lr=0.02, weight_decay=0.1, muon_weight_decay=0.7, decay_vectors=decay_vectors)
    assert len(optimizer.param_groups) == 2  # as before there was a decay
    layer = theirs.layers[0]
    norms = {"params": [layer.norm.weight], "weight_decay": 0.1 if decay_vectors else 0.0}
    adamw = torch.optim.AdamW([norms, {"params": [theirs.lm_head.weight], "weight_decay": 0.1}], lr=3e-3, betas=(0.9, 0.95), fused=True)
    muon = torch.optim.Muon([layer.wide.weight, layer.tall.weight], lr=0.02, weight_decay=0.7)
    for seed in range(4):
        for model in (ours, theirs):
            gradients(model, seed)
            model.layers[0].wide.weight.grad.zero_()
            model.layers[0].tall.weight.grad.zero_()
        for each in (optimizer, adamw, muon):
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_muon_takes_the_decay_of_both_where_none_of_its_own_is_given():
    model = toy()
    mark_hidden_matrices(model)
    assert [group["weight_decay"] for group in MuonAdamW(model.parameters(), weight_decay=0.3).param_groups] == [0.3, 0.3]
    assert [group["weight_decay"] for group in MuonAdamW(model.parameters(), weight_decay=0.3, muon_weight_decay=0.0).param_groups] == [0.3, 0.0]


def test_state_saved_before_there_was_a_decay_goes_on_without_one():
    model = toy()
    mark_hidden_matrices(model)
    optimizer = MuonAdamW(model.parameters())
    train(model, [optimizer], steps=2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["weight_decay"]
    again = MuonAdamW(model.parameters(), weight_decay=0.1)
    with pytest.warns(UserWarning, match="checkpoint's weight_decay 0.0, not 0.1"):
        again.load_state_dict(saved)
    assert [group["weight_decay"] for group in again.param_groups] == [0.0, 0.0]
    train(model, [again], steps=1)


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


def test_fc_goes_to_muon_where_it_is_asked_for():
    model = nn.Module()
    model.fc, model.lm_head = nn.Linear(6, 4, bias=False), nn.Linear(4, 9, bias=False)
    mark_hidden_matrices(model)
    groups = {group["kind"]: group["params"] for group in MuonAdamW(model.parameters(), matrices="layers_and_fc").param_groups}
    assert groups["muon"] == [model.fc.weight] and groups["adamw"] == [model.lm_head.weight]
    assert [group["kind"] for group in MuonAdamW(model.parameters()).param_groups] == ["adamw"]


BAD = {"momentum": 1.0, "weight_decay": -0.1, "muon_weight_decay": 1e3, "matrices": "fc", "polynomial": "cubic", "adjust_lr": "rms"}


@pytest.mark.parametrize("name", BAD)
def test_bad_rates_are_refused(name):
    with pytest.raises(UserError, match=f"model.optimizer.{name}"):
        MuonAdamW(toy().parameters(), **{name: BAD[name]})
