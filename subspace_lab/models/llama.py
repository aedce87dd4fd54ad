"""LLaMA from random initialisation, through transformers' LlamaForCausalLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def build_llama(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_layers: int,
    num_kv_heads: int | None = None,
    vocab_size: int | None = None,
    max_position_embeddings: int = 1024,
    gradient_checkpointing: bool = False,
    data_vocab_size: int | None = None,
) -> LlamaForCausalLM:
    """A LLaMA as in GaLore's configs: SiLU, RMSNorm ε = 1e-6, untied embeddings, init std 0.02.

    Args:
        hidden_size: model width.
        intermediate_size: width of the gated MLP.
        num_heads: attention heads.
        num_layers: transformer blocks.
        num_kv_heads: heads of keys and values (grouped-query attention); None is one for each attention head.
        max_position_embeddings: longest sequence, in tokens.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        vocab_size: number of embeddings; None takes the data's.
        data_vocab_size: one more than the largest token id of the data; given by the runner.

    Raises:
        UserError: the vocabulary is too small for the data, or heads do not divide the hidden size.
    """
    vocab = vocab_size if vocab_size is not None else data_vocab_size
    if vocab is None:
        raise UserError(
            "model.vocab_size is not set and no data was given to take it from", hint="model.vocab_size=32000"
        )
    if data_vocab_size is not None and vocab < data_vocab_size:
        raise UserError(
            f"model.vocab_size={vocab} is smaller than the data's vocabulary of {data_vocab_size}",
            hint=f"model.vocab_size={data_vocab_size}, or model.vocab_size=null to follow the data",
        )
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_heads": num_heads}
    sizes |= {"num_layers": num_layers, "max_position_embeddings": max_position_embeddings}
    for key, size in sizes.items():
        if size < 1:
            raise UserError(f"model.{key}={size}: expected at least 1")
    if hidden_size % num_heads:
        raise UserError(f"model.hidden_size={hidden_size} is not divisible by model.num_heads={num_heads}")
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise UserError(f"model.num_heads={num_heads} is not divisible by model.num_kv_heads={num_kv_heads}")
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds of import: only for this model

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=num_layers,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    if gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model
