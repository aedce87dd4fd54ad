"""What several processes hold and send: closed form against an estimate on shapes (real bytes: tests/distributed)."""

from __future__ import annotations

from typing import Any

import pytest

from subspace_lab.analysis.cost_model import Costs, Weight, costs, llama_weights

LLAMA = ["paths.output_dir=.", "model=llama_9m", "model.vocab_size=512", "data.block_size=32"]
WEIGHTS = llama_weights(128, 352, 4, 4, None, 512)


def estimated(*words: str) -> Any:
    from subspace_lab.app import compose_config
    from subspace_lab.protocols.estimate import estimate

    return estimate(compose_config([*LLAMA, *words]), [])


@pytest.mark.parametrize(
    ("method", "strategy", "processes"),
    [("galore", "ddp", 8), ("galore", "fsdp", 2), ("galore", "fsdp", 11), ("none", "ddp", 2), ("none", "fsdp", 8)],
)
def test_estimate_agrees_with_the_closed_form(method: str, strategy: Any, processes: int) -> None:
    words = [f"method={method}", f"trainer={strategy}", f"trainer.devices={processes}", "trainer.precision=bf16-true"]
    found = estimated(*words, *(["method.rank=24"] if method == "galore" else []))
    rank = 24 if method == "galore" else None
    formula = costs(WEIGHTS, processes=processes, strategy=strategy, width=2, rank=rank)
    assert found.parameters == sum(x.entries for x in WEIGHTS)
    # The first process has the longest part of what does not divide, and its counters; a tenth where eleven share 512.
    slack = 0.05 if processes == 11 else 2e-3
    for name in ("weights", "gradients", "state", "gathered", "sent", "sent_refresh"):
        assert getattr(found, name) == pytest.approx(getattr(formula, name), rel=slack, abs=600), name


def test_sharding_divides_what_processes_hold() -> None:
    one, eight = (estimated("method=none", "trainer=fsdp", f"trainer.devices={n}") for n in (2, 8))
    assert one.weights == pytest.approx(4 * eight.weights, rel=1e-3)
    assert one.state == pytest.approx(4 * eight.state, rel=1e-2)
    alone = estimated("method=none")
    assert alone.processes == 1 and alone.sent == alone.gathered == 0
    assert alone.weights == 2 * one.weights


def test_costs_by_hand() -> None:
    """Two square matrices of 4 × 4, one of them in a block and projected on two directions; two processes."""
    weights = [Weight(4, 4, None, False), Weight(4, 4, 0, True)]
    whole = 2 * 16 * 4
    ddp = costs(weights, processes=2, strategy="ddp", width=4, rank=2)
    assert ddp == Costs(whole, whole, 2 * 64 + 8 * 4 * 2 + 4 * 4 * 2, 0.0, whole, 4 * 4 * 2 / 2)
    fsdp = costs(weights, processes=2, strategy="fsdp", width=4, rank=2)
    assert fsdp.state == 64 + (8 * 4 * 2 + 4 * 4 * 2) / 2 and fsdp.gathered == whole
    assert fsdp.sent == 0.5 * (2 * 64 + 64 + whole) + 4 * 4 * 2 + 4  # the basis twice, and a flag
    assert fsdp.sent_refresh == 5 * 4 * 4 * 4 + 6 * 8 * 16 + 8 + 4 * 4 * 2 / 2


def test_without_a_gpu_eight_are_assumed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from subspace_lab.app import compose_config
    from subspace_lab.protocols.estimate import print_estimate

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    print_estimate([("galore", compose_config([*LLAMA, "method.rank=8", "trainer=fsdp"]))])
    printed = capsys.readouterr().out
    assert "8 processes, fsdp" in printed and "no GPU here to count: 8 per machine" in printed
    assert "sent per step" in printed and "more per refresh" in printed and "gathered weights" in printed
