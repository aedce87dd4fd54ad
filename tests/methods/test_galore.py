from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from reference.galore_literal import GaLoreMatrix
from torch import nn
from torch.optim import AdamW

from subspace_lab.errors import UserError
from subspace_lab.methods.galore import GaLore
from subspace_lab.subspaces import SVD


class Block(nn.Module):
    """Tall, wide and square weights, named as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(10, 10, bias=False)
        self.mlp_up = nn.Linear(10, 16, bias=False)
        self.mlp_down = nn.Linear(16, 10, bias=False)
        self.norm = nn.LayerNorm(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.mlp_down(torch.tanh(self.mlp_up(torch.tanh(self.attn(x))))))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_equals_the_literal_transcription(variant) -> None:
    torch.manual_seed(0)
    model = Block().double().float()
    method = GaLore(SVD(4), rank=4, refresh_every=5, scale=0.25, variant=variant)
    opt = method.build_optimizer(model, partial(AdamW, lr=1e-2, weight_decay=0.0))
    eps = 1e-6 if variant == "release" else 1e-8
    slow = {
        n: GaLoreMatrix(p.detach(), 4, 5, 0.25, 1e-2, eps, variant) for n, p in model.named_parameters() if p.ndim == 2
    }
    x = torch.randn(32, 10)
    target = torch.randn(32, 10)
    for _ in range(13):
        opt.zero_grad()
        ((model(x) - target) ** 2).mean().backward()
        for n, p in model.named_parameters():
            if n in slow:
                slow[n].step(p.grad.clone())
        opt.step()
        for n, p in model.named_parameters():
            if n in slow:
                torch.testing.assert_close(p.data, slow[n].W, atol=1e-5, rtol=1e-5)
                slow[n].W = p.data.clone()  # compare step by step: no accumulation of rounding through the network


GOLDEN = Path(__file__).parent / "galore_torch_golden.json"


def golden_weights() -> dict[str, torch.Tensor]:
    """Start, and integer-made gradients, of the golden run: nothing here depends on a random generator."""
    shapes = {"tall": (12, 8), "wide": (6, 9), "square": (7, 7), "bias": (5,)}
    return {n: _pattern(s, i) * 0.1 for i, (n, s) in enumerate(shapes.items())}


def _pattern(shape: tuple[int, ...], k: int) -> torch.Tensor:
    n = torch.Size(shape).numel()
    i = torch.arange(n, dtype=torch.float64)
    return ((i * i * 7 + i * (13 + k) + 5 * k) % 31 / 15.0 - 1.0 + (i * 17 + k) % 11 / 50.0).float().reshape(shape)


def golden_gradient(name: str, shape: tuple[int, ...], t: int) -> torch.Tensor:
    return _pattern(shape, 3 * t + len(name)) * 1e-2


def test_matches_25_steps_of_galore_torch() -> None:
    """Numbers from galore-torch 1.0 (PyPI), GaLoreAdamW, fp32, CPU, rank 3, refresh every 10, scale 0.25, lr 0.01."""
    import json

    expected = json.loads(GOLDEN.read_text())["weights"]
    model = nn.ParameterDict({n: nn.Parameter(w) for n, w in golden_weights().items()})
    method = GaLore(SVD(3), rank=3, refresh_every=10, scale=0.25, variant="release")
    method.param_groups = lambda m: [  # type: ignore[method-assign]
        {"params": [(n, p) for n, p in m.items() if p.ndim == 2], "subspace": method.subspace, "scale": 0.25},
        {"params": [(n, p) for n, p in m.items() if p.ndim == 1]},
    ]
    opt = method.build_optimizer(model, partial(AdamW, lr=1e-2, weight_decay=0.0))
    for t in range(25):
        for n, p in model.items():
            p.grad = golden_gradient(n, tuple(p.shape), t)
        opt.step()
    for n, p in model.items():
        torch.testing.assert_close(p.data.flatten(), torch.tensor(expected[n]), atol=1e-5, rtol=0)


def test_release_differs_from_paper() -> None:
    def run(variant) -> torch.Tensor:
        w = nn.Linear(6, 8, bias=False)
        w.weight.data = torch.ones(8, 6)
        model = nn.ModuleDict({"mlp": w})
        opt = GaLore(SVD(2), rank=2, refresh_every=2, variant=variant).build_optimizer(model, partial(AdamW, lr=1e-2))
        for t in range(6):
            w.weight.grad = golden_gradient("ab", (8, 6), t) * 1e-4  # gradients of the size of ε
            opt.step()
        return w.weight.data

    assert (run("paper") - run("release")).abs().max() > 1e-4


def test_projects_attention_and_mlp_only() -> None:
    model = nn.ModuleDict(
        {
            "self_attn": nn.Linear(4, 4),
            "mlp": nn.Linear(4, 4),
            "lm_head": nn.Linear(4, 9),
            "embed": nn.Embedding(9, 4),
        }
    )
    inside, outside = GaLore(SVD(2)).param_groups(model)
    assert [n for n, _ in inside["params"]] == ["self_attn.weight", "mlp.weight"]
    assert {n for n, _ in outside["params"]} == {
        "self_attn.bias",
        "mlp.bias",
        "lm_head.weight",
        "lm_head.bias",
        "embed.weight",
    }
    inside, _ = GaLore(SVD(2), targets="all-linear").param_groups(model)
    assert [n for n, _ in inside["params"]] == ["self_attn.weight", "mlp.weight"]


def test_no_matching_layer_says_what_there_is() -> None:
    with pytest.raises(UserError, match=r"matches no layer.*\['0', '1'\]"):
        GaLore(SVD(2)).param_groups(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


@pytest.mark.parametrize(("option", "value"), [("rank", 0), ("scale", 0.0), ("refresh_every", -1)])
def test_values_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"method.{option} must be"):
        GaLore(**{option: value})


if __name__ == "__main__":  # writes the golden numbers; needs `pip install galore-torch`
    import json

    from galore_torch import GaLoreAdamW

    params = {n: nn.Parameter(w) for n, w in golden_weights().items()}
    opt = GaLoreAdamW(
        [
            {"params": [params["bias"]]},
            {
                "params": [params[n] for n in ("tall", "wide", "square")],
                "rank": 3,
                "update_proj_gap": 10,
                "scale": 0.25,
                "proj_type": "std",
            },
        ],
        lr=1e-2,
        no_deprecation_warning=True,
    )
    for t in range(25):
        for n, p in params.items():
            p.grad = golden_gradient(n, tuple(p.shape), t)
        opt.step()
    run = "fp32, CPU, 25 steps, rank 3, gap 10, scale 0.25, lr 0.01"
    origin = f"galore-torch 1.0 GaLoreAdamW, torch {torch.__version__}, {run}"
    GOLDEN.write_text(
        json.dumps({"origin": origin, "weights": {n: p.data.flatten().tolist() for n, p in params.items()}}) + "\n"
    )
    sys.exit(0)
