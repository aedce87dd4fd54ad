"""The memory table against arithmetic on the shapes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize("precision,weight_bytes", [("32-true", 4), ("bf16-true", 2), ("bf16-mixed", 4)])
def test_weights_gradients_and_adam_state(precision: str, weight_bytes: int) -> None:
    from subspace_lab.app import compose_config
    from subspace_lab.protocols.estimate import estimate

    words = [
        "paths.output_dir=.",
        "model=llama_9m",
        "method=none",
        f"trainer.precision={precision}",
        "data.block_size=64",
    ]
    memory = estimate(compose_config(words), [])
    vocab, d, i, layers = 257, 128, 352, 4
    parameters = 2 * vocab * d + layers * (4 * d * d + 3 * d * i + 2 * d) + d
    assert memory.parameters == parameters
    assert memory.weights == memory.gradients == weight_bytes * parameters
    assert memory.state == pytest.approx(2 * weight_bytes * parameters, rel=1e-3)
    # Logits in fp32 alone are saved for the backward pass, and nothing as large as ten times everything else.
    assert memory.activations > 8 * 64 * vocab * 4


def test_galore_state_per_layer_and_checkpointing(capsys: pytest.CaptureFixture[str]) -> None:
    from subspace_lab.app import compose_config
    from subspace_lab.protocols.estimate import estimate, print_estimate

    words = ["paths.output_dir=.", "model=llama_9m", "method.rank=16"]
    whole = compose_config(words)
    galore = estimate(whole, [])
    adam = estimate(compose_config([*words[:2], "method=none"]), [])
    assert galore.weights == adam.weights and galore.activations == adam.activations
    d, i, layers, r = 128, 352, 4, 16
    # GaLore: moments on the long side, bases on the short side, of the attention's and the MLP's matrices.
    saved = layers * (4 * (2 * d * d - 3 * d * r) + 3 * (2 * d * i - 2 * i * r - d * r)) * 4
    assert adam.state - galore.state == pytest.approx(saved, rel=0.01)
    layered = estimate(compose_config([*words, "method.per_layer=true", "model.gradient_checkpointing=true"]), [])
    assert layered.gradients == max(257 * d, d * i) * 4
    assert layered.activations < 0.7 * galore.activations
    print_estimate([("galore", whole)])
    printed = capsys.readouterr().out
    assert "optimizer state" in printed and "activations" in printed


def test_no_tokenizer_is_needed(tmp_path: Path) -> None:
    from subspace_lab.app import compose_config
    from subspace_lab.protocols.estimate import estimate

    notes: list[str] = []
    words = [
        "paths.output_dir=.",
        "model=llama_9m",
        "data=c4",
        f"data.files={tmp_path}/none.jsonl",
        "data.batch_size=1",
    ]
    memory = estimate(compose_config(words), notes)
    assert memory.parameters > 2 * 32000 * 128
    assert len(notes) == 1 and "t5-base" in notes[0]
