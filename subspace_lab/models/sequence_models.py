"""Models that answer in text: pretrained T5 or LLaMA through transformers, or a small T5 with random weights."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.models.initialization import bell_

_HINT = "model.path=/a/folder with the model; with a network it is downloaded once"
_NO_DATA = "this model answers prompts and takes its sizes from them"


def build_pretrained(
    *,
    path: str,
    gradient_checkpointing: bool = False,
    data_form: Literal["seq2seq", "causal"] | None = None,
    data_sequence_tokens: int | None = None,
) -> nn.Module:
    """A pretrained model with encoder and decoder, or one that continues a text, with its own output layer.

    Args:
        path: a name on the Hugging Face hub, or a folder with config.json and weights.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        data_form: which of the two the data are made for; given by the runner.
        data_sequence_tokens: size of the data's vocabulary; given by the runner.

    Raises:
        UserError: no such folder, offline and not cached, the other kind of model, or a vocabulary smaller than the
            tokenizer's.
    """
    if data_form is None:
        raise UserError(_NO_DATA, hint="data=text_5_tasks")
    from transformers.utils import logging as hf_logging

    folder = Path(path).expanduser()
    if not folder.is_dir() and path.startswith((".", "/", "~")):
        raise UserError(f"model.path={path}: no such folder", hint=_HINT)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        model: Any = _load(str(folder) if folder.is_dir() else path)
    except Exception as error:
        from subspace_lab.data.hub import hub_error

        raise hub_error("", f"model.path={path} from a folder or the Hugging Face hub", error, _HINT) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
    if kind != data_form:
        raise UserError(f"model.path={path} is a {kind} model, data.form={data_form}", hint=f"data.form={kind}")
    if data_sequence_tokens is not None and model.config.vocab_size < data_sequence_tokens:
        raise UserError(
            f"model.path={path} has {model.config.vocab_size} token embeddings, data.tokenizer "
            f"{data_sequence_tokens} tokens",
            hint="data.tokenizer: the model's own",
        )
    if gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    assert isinstance(model, nn.Module)
    return model


def _load(name: str) -> Any:
    from torch._guards import detect_fake_mode
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from subspace_lab.data.hub import require_network

    def fetch(**options: Any) -> Any:
        config = AutoConfig.from_pretrained(name, **options)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if detect_fake_mode() is not None:  # `estimate=true` wants shapes, not weights
            return kind.from_config(config)
        # Weights as the trainer's precision wants them are cast later; half-precision files would stay so otherwise.
        return kind.from_pretrained(name, dtype=torch.float32, **options)

    try:
        return fetch(local_files_only=True)
    except (OSError, ValueError):
        if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise
        require_network()
        return fetch()


def build_t5(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_layers: int,
    dropout: float = 0.1,
    data_form: Literal["seq2seq", "causal"] | None = None,
    data_sequence_tokens: int | None = None,
    data_pad_id: int | None = None,
) -> nn.Module:
    """A T5 (Raffel et al., JMLR 2020) from random initialisation, for tests and machines without pretrained weights.

    ReLU, tied embeddings, T5's own standard deviations.

    Args:
        hidden_size: model width.
        intermediate_size: width of the MLP.
        num_heads: attention heads.
        num_layers: blocks of the encoder and of the decoder.
        dropout: in [0, 1).
        data_form: must be seq2seq; given by the runner.
        data_sequence_tokens: size of the data's vocabulary; given by the runner.
        data_pad_id: the token that pads, and starts the decoder; given by the runner.

    Raises:
        UserError: heads do not divide the width, or no data to take the sizes from.
    """
    if data_sequence_tokens is None:
        raise UserError(_NO_DATA, hint="data=text_5_tasks")
    if data_form == "causal":
        raise UserError("this model has an encoder and a decoder, data.form=causal", hint="data.form=seq2seq")
    if hidden_size % num_heads:
        raise UserError(f"model.hidden_size={hidden_size} is not divisible by model.num_heads={num_heads}")
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout={dropout}: expected a number from 0 to below 1")
    from transformers import T5Config, T5ForConditionalGeneration

    pad = data_pad_id or 0
    config = T5Config(
        vocab_size=data_sequence_tokens,
        d_model=hidden_size,
        d_kv=hidden_size // num_heads,
        d_ff=intermediate_size,
        num_heads=num_heads,
        num_layers=num_layers,
        dropout_rate=dropout,
        pad_token_id=pad,
    )
    config.decoder_start_token_id = pad
    model: Any = T5ForConditionalGeneration(config)
    width, inner = hidden_size, hidden_size // num_heads
    stds = {
        "shared": 1.0,
        "q": 1 / math.sqrt(width * inner),  # T5 has no 1/√d in its attention
        "o": 1 / math.sqrt(num_heads * inner),
        "wo": 1 / math.sqrt(intermediate_size),
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = stds.get(name.split(".")[-2], 1 / math.sqrt(width))
            bell_(parameter, std, derive_key("init/1", torch.initial_seed(), name))
    assert isinstance(model, nn.Module)
    return model
