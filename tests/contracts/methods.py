"""What every method must do.  A new one inherits these tests by supplying `build`."""

from __future__ import annotations

import io
from functools import partial

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from subspace_lab.methods.base import Method


class Tower(nn.Module):
    """Square, tall and wide weights, embeddings, norms and a head, named as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(32, 16)
        self.attn = nn.Linear(16, 16, bias=False)
        self.mlp_up = nn.Linear(16, 40)
        self.mlp_down = nn.Linear(40, 16)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h + self.attn(h)
        return self.lm_head(self.norm(h + self.mlp_down(torch.tanh(self.mlp_up(h)))))


TOKENS = torch.arange(256).reshape(8, 32) * 5 % 32


def step(model: nn.Module, optimizer: Optimizer, spoil: str | None = None) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    loss.backward()
    if spoil is not None:
        grad = dict(model.named_parameters())[spoil].grad
        assert grad is not None
        grad[0, 0] = float("nan")
    optimizer.step()
    return loss.item()


class MethodContract:
    """Subclass and implement `build`."""

    #: a NaN in one matrix's gradient leaves all weights finite
    survives_bad_gradients = True

    def build(self) -> Method:
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """The module that exported weights belong to: the model itself, unless the method changes its head."""
        return Tower()

    def start(self) -> tuple[Method, nn.Module, Optimizer]:
        method = self.build()
        model = method.prepare(Tower())
        return method, model, method.build_optimizer(model, partial(AdamW, lr=0.01, weight_decay=0.0))

    def test_every_parameter_is_in_one_group(self) -> None:
        method, model, optimizer = self.start()
        named = [n for g in method.param_groups(model) for n, _ in g["params"]]
        assert sorted(named) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
        held = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    def test_learns(self) -> None:
        method, model, optimizer = self.start()
        losses = []
        for _ in range(40):
            losses.append(step(model, optimizer))
            method.after_step(optimizer)
        assert losses[-1] < 0.5 * losses[0]

    def test_continues_bit_for_bit(self) -> None:
        _, model, optimizer = self.start()
        for _ in range(7):
            step(model, optimizer)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        _, other, again = self.start()
        other.load_state_dict(saved["model"])
        again.load_state_dict(saved["optimizer"])
        assert [step(other, again) for _ in range(6)] == [step(model, optimizer) for _ in range(6)]

    def test_bad_gradient_leaves_weights_finite(self) -> None:
        if not self.survives_bad_gradients:
            return
        _, model, optimizer = self.start()
        for t in range(8):
            step(model, optimizer, "attn.weight" if t in (0, 4) else None)
        assert all(torch.isfinite(p).all() for p in model.parameters())

    def test_export_is_a_plain_checkpoint(self) -> None:
        method, model, optimizer = self.start()
        step(model, optimizer)
        plain = self.plain()
        plain.load_state_dict(method.export(model))
        assert torch.equal(plain(TOKENS), model(TOKENS))

    def test_metrics_are_numbers(self) -> None:
        method, model, optimizer = self.start()
        if hasattr(optimizer, "measure"):
            optimizer.measure = True
        step(model, optimizer)
        for name, value in method.metrics().items():
            assert float(value) == float(value), name
