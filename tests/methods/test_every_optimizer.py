"""Any method takes any optimizer of the group as its inner optimizer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from subspace_lab.build import instantiate
from subspace_lab.methods.base import Method
from subspace_lab.methods.full import Full
from subspace_lab.methods.galore import GaLore
from subspace_lab.methods.gcr import GCR
from subspace_lab.methods.intrinsic import IntrinsicDimension
from subspace_lab.subspaces import SVD, Identity, Random, Randomized

GROUP = Path(__file__).parents[2] / "conf" / "optimizer"
# torchao compiles its step: half a minute of C++ on a laptop
OPTIMIZERS = [
    pytest.param(f.stem, marks=pytest.mark.slow if f.stem == "adam8bit" else ()) for f in sorted(GROUP.glob("*.yaml"))
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.attn = nn.Linear(64, 64, bias=False)
        self.mlp = nn.Linear(64, 128, bias=False)
        self.mlp_down = nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h + self.attn(h)
        return self.lm_head(self.norm(h + self.mlp_down(torch.tanh(self.mlp(h)))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x = torch.arange(128).reshape(8, 16) % 64
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def methods() -> dict[str, Method]:
    return {
        "none": Full(),
        "galore": GaLore(SVD(8), refresh_every=3),
        "galore release": GaLore(SVD(8), refresh_every=3, variant="release"),
        "galore randomized": GaLore(Randomized(8), refresh_every=3),
        "galore random": GaLore(Random(8), refresh_every=3),
        "galore identity": GaLore(Identity(), refresh_every=3, scale=1.0),
        "gcr": GCR(k=3, head_lr=0.05),
        "gcr release": GCR(k=3, head_lr=0.05, variant="release"),
        "intrinsic dimension": IntrinsicDimension(d=200, lr=0.01),
        "intrinsic dimension said": IntrinsicDimension(d=200, lr=0.01, variant="said"),
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", list(methods()))
def test_learns_and_resumes(name: str, method: str) -> None:
    node = OmegaConf.merge(OmegaConf.load(GROUP / f"{name}.yaml"), {"lr": 0.01})
    factory = instantiate(node)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        chosen = methods()[method]
        model = chosen.prepare(Tiny())
        return model, chosen.build_optimizer(model, factory)

    model, optimizer = build()
    losses = train(model, optimizer, 4)
    assert losses[-1] < losses[0]
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, again = build()
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert train(other, again, 3) == train(model, optimizer, 3)
