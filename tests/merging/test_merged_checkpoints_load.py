"""A merged folder loads with transformers, in one file or in shards."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.merging_files import merge
from safetensors import safe_open

from subspace_lab.merging import merge_state_dicts
from subspace_lab.merging.averaging import TaskArithmetic


def _llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes))


def _clip(seed: int) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [None, "8KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("build", [_llama, _clip], ids=["llama", "clip"])
def test_merged_folders_load_with_transformers(build: Callable[[int], Any], shards: str | None, tmp_path: Path) -> None:
    from transformers import AutoModel

    networks = [build(seed) for seed in range(3)]
    for t, network in enumerate(networks):
        network.save_pretrained(tmp_path / str(t), **({"max_shard_size": shards} if shards else {}))
    (tmp_path / "0" / "tokenizer.json").write_text("{}")
    (tmp_path / "0" / "notes.md").write_text("x")
    names = [str(tmp_path / str(t)) for t in range(3)]
    # Experts may be cut into shards differently from the base.
    networks[2].save_pretrained(tmp_path / "2b")
    merge(tmp_path, base=names[0], models=[names[1], str(tmp_path / "2b")])
    out = tmp_path / "out"
    assert (out / "model.safetensors.index.json").is_file() == (shards is not None)
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(
        p.name for p in Path(names[0]).glob("*.safetensors")
    )
    assert (out / "tokenizer.json").is_file()
    assert not (out / "notes.md").exists()
    assert re.search("^library_name: transformers$", (out / "README.md").read_text(), re.MULTILINE)
    loaded = type(networks[0]).from_pretrained(out).state_dict()
    states = [network.state_dict() for network in networks]
    expected = merge_state_dicts(TaskArithmetic(0.3), states[0], states[1:])
    assert loaded.keys() == expected.keys()
    assert all(torch.allclose(loaded[name], W, atol=1e-6) for name, W in expected.items())
    AutoModel.from_pretrained(out)
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
