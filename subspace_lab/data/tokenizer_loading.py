"""Finding and opening the tokenizer that `data.tokenizer=` names; its library is imported only then."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.data.tokenization import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    VocabularyTokenizer,
    file_hash,
)
from subspace_lab.errors import UserError


def load_tokenizer(name: str, data_dir: Path) -> Tokenizer:
    """Find and load the tokenizer that `data.tokenizer=name` asks for.

    Looked for in this order: `bytes`; a path as typed; `<data_dir>/tokenizers/<name>`; the HF cache; the HF
        hub.

    Raises:
        UserError: nothing of that name, offline, or a file that is no tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    for path in (Path(name).expanduser(), data_dir / "tokenizers" / name):
        if path.exists():
            return _local(path)
    if name.endswith((".json", ".model")) or name.startswith((".", "/", "~")):
        raise UserError(f"data.tokenizer={name}: no such file or folder", hint=_local_hint(data_dir))
    return _from_hub(name, data_dir)


def _local(path: Path) -> Tokenizer:
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return _tokenizer_json(path / "tokenizer.json")
        if (path / "vocab.json").exists() and (path / "merges.txt").exists():
            return _byte_level_bpe(path)
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return SentencePieceTokenizer(models[0])
        raise UserError(
            f"data.tokenizer={path}: expected tokenizer.json, vocab.json with merges.txt, or one .model file there"
        )
    return _tokenizer_json(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _tokenizer_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer={path} is not a tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _wrap(str(path), file_hash(path), tokenizer)


def _byte_level_bpe(folder: Path) -> Tokenizer:
    import tokenizers

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise UserError(f"data.tokenizer={folder}: vocab.json and merges.txt do not fit together ({error})") from error
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _wrap(str(folder), _digest(file_hash(vocab), file_hash(merges)), tokenizer)


def _wrap(name: str, identity: str, tokenizer: Any) -> Tokenizer:
    specials = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return VocabularyTokenizer(
        name,
        identity,
        tokenizer.get_vocab(with_added_tokens=True),
        specials,
        encode=lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        decode=tokenizer.decode,
    )


def _from_hub(name: str, data_dir: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        try:
            # No network when it is cached.
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
                raise
            require_network()
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        tried = f"data.tokenizer={name}: no such path, none under {data_dir / 'tokenizers'} (SUBSPACE_DATA)"
        source = f"'{name}' from the Hugging Face cache or hub"
        raise hub_error(tried, source, error, _local_hint(data_dir)) from error
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return VocabularyTokenizer(
        name,
        _digest(name, json.dumps(vocabulary, sort_keys=True)),
        vocabulary,
        specials,
        encode=lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [],
        decode=lambda ids: str(tokenizer.decode(ids)),
        eos=tokenizer.eos_token,
        pad=tokenizer.pad_token,
        bos=tokenizer.bos_token,
    )


def _local_hint(data_dir: Path) -> str:
    folder = data_dir / "tokenizers"
    found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    local = f"data.tokenizer={' or '.join(found)} (in {folder}), " if found else ""
    return f"{local}data.tokenizer=bytes, or a local tokenizer.json or sentencepiece .model"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
