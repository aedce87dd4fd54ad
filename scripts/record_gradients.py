"""Record real gradients of a LLaMA with the 60M model's matrix shapes, for benchmarks of bases.

    python scripts/record_gradients.py [--steps 200] [--layers 3] [--tokens 512] OUT.safetensors

Trains on the bytes of the standard library's text with AdamW and keeps the gradients of the projected matrices at
steps 0, 1, 10 … so that a basis of any age can be compared with the best one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from subspace_lab.methods.base import split_parameters
from subspace_lab.models.llama import build_llama


def standard_library_bytes(limit: int) -> torch.Tensor:
    """The first `limit` bytes of the standard library's sources, in name order, as an int64 tensor."""
    folder = Path(argparse.__file__).parent
    text = b"".join(p.read_bytes() for p in sorted(folder.glob("*.py")))[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def record(out: Path, steps: int, layers: int, tokens: int) -> None:
    """Train and write ``<step>/<parameter>`` gradients (fp32) to `out`."""
    torch.manual_seed(0)
    model = build_llama(hidden_size=512, intermediate_size=1376, num_heads=8, num_layers=layers, vocab_size=257)
    inside, _ = split_parameters(model, ("attn", "mlp"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    data = standard_library_bytes(4_000_000)
    wanted = {0, 1, 10, 20, steps - 10, steps - 1, steps}
    kept: dict[str, torch.Tensor] = {}
    for step in range(steps + 1):
        rows = torch.randint(0, len(data) - 128, (tokens // 128,))
        batch = torch.stack([data[i : i + 128] for i in rows])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if step in wanted:
            kept |= {f"{step}/{n}": p.grad.clone() for n, p in inside if p.grad is not None}
            print(f"step {step}: loss {loss.item():.3f}, recorded", flush=True)
        optimizer.step()
        optimizer.zero_grad()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    record(args.out, args.steps, args.layers, args.tokens)
