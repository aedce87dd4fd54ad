from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subspace_lab.data.tokenization import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from subspace_lab.data.tokenizer_loading import load_tokenizer
from subspace_lab.errors import UserError

TEXT = "the quick brown fox jumps over a lazy dog, café and 12 wizards\nbake bread"


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [TEXT, "seven wizards quietly bake bread near old rivers", "the dog and the fox"] * 20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> dict[str, Path]:
    """One tokenizer of each kind, trained here: tokenizer.json, vocab.json + merges.txt, sentencepiece."""
    import sentencepiece
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizers")
    bpe = Library(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.enable_truncation(4)  # files in the wild carry such settings: they must not cut documents
    bpe.enable_padding(length=4)
    bpe.save(str(folder / "tokenizer.json"))
    pair = folder / "pair"
    pair.mkdir()
    state = json.loads(bpe.to_str())["model"]
    (pair / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]
    (pair / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    lines = folder / "lines.txt"
    lines.write_text("\n".join(text.replace("\n", " ") for text in corpus))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(folder / "piece"),
        vocab_size=42,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return {"json": folder / "tokenizer.json", "pair": pair, "piece": folder / "piece.model"}


@pytest.mark.parametrize("kind", ["bytes", "json", "pair", "piece"])
def test_round_trip(kind: str, built: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(built.get(kind, kind)), Path("none"))
    texts = [TEXT, "", "a", "zebra ☃ quiz"]
    encoded = tokenizer.encode(texts)
    assert [ids.dtype for ids in encoded] == [np.uint32] * 4 and len(encoded[1]) == 0
    decoded = tokenizer.decode([tokenizer.pad_id, *encoded[0].tolist(), tokenizer.eos_id])
    expected = TEXT.replace("\n", " ") if kind == "piece" else TEXT  # sentencepiece normalises white space
    assert decoded == expected
    largest = max(int(ids.max()) for ids in encoded if len(ids))
    assert largest < tokenizer.vocab_size
    assert tokenizer.eos_id < tokenizer.vocab_size and tokenizer.pad_id < tokenizer.vocab_size
    assert all(tokenizer.eos_id not in ids for ids in encoded), "only packing puts the separator in"


def test_ids_and_sizes(built: dict[str, Path]) -> None:
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eos_id) == (257, 256)
    piece = load_tokenizer(str(built["piece"]), Path("none"))
    assert isinstance(piece, SentencePieceTokenizer)
    assert (piece.vocab_size, piece.eos_id, piece.pad_id) == (42, 1, 0)
    from_json = load_tokenizer(str(built["json"]), Path("none"))
    assert (from_json.eos_id, from_json.pad_id) == (1, 0) and from_json.vocab_size <= 320


def test_folder_and_prepared_folder(built: dict[str, Path], tmp_path: Path) -> None:
    assert load_tokenizer(str(built["json"].parent), tmp_path).identity == identity(built["json"])
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "mine").symlink_to(built["pair"])
    assert load_tokenizer("mine", tmp_path).identity == identity(built["pair"])


def identity(path: Path) -> str:
    return load_tokenizer(str(path), Path("none")).identity


def test_identity_follows_the_file(built: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(built["json"].read_bytes())
    assert identity(copy) == identity(built["json"])
    copy.write_bytes(built["json"].read_bytes().replace(b'"</s>"', b'"<eos>"'))
    assert identity(copy) != identity(built["json"])
    assert load_tokenizer(str(copy), tmp_path).eos_id == 1


def save_words(path: Path, specials: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "the", "fox"])}
    tokenizer = Library(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path))
    return load_tokenizer(str(path), path.parent)


def test_no_separator_gets_a_new_id(tmp_path: Path) -> None:
    tokenizer = save_words(tmp_path / "tokenizer.json", [])
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (3, 3, 4)


def test_sentinels_do_not_enlarge_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = save_words(tmp_path / "tokenizer.json", ["</s>", "<extra_0>", "<extra_1>"])
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.encode(["the <extra_1> fox"])[0].tolist() == [1, 0, 2], "spelled out, they are unknown"


def test_long_texts_are_cut_at_lines(monkeypatch: pytest.MonkeyPatch, built: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(built["pair"]), Path("none"))
    text = "the quick brown fox\n" * 50
    whole = tokenizer.encode([text, "a"])
    monkeypatch.setattr("subspace_lab.data.tokenization._PIECE", 90)
    pieces = tokenizer.encode([text, "a", "x" * 1000])
    np.testing.assert_array_equal(whole[0], pieces[0])
    assert tokenizer.decode(pieces[2].tolist()) == "x" * 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b"{}"), ("x.model", b"nothing"), ("empty", None), ("pair", b"")],
)
def test_not_a_tokenizer(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif name == "pair":
        path.mkdir()
        (path / "vocab.json").write_text('{"a": 0}')
        (path / "merges.txt").write_text("#version: 0.2\nb c\n")
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tokenizer=") as caught:
        load_tokenizer(str(path), tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_file_and_offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizers" / "t5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no such file.*data\.tokenizer=t5 .*data\.tokenizer=bytes"):
        load_tokenizer("./no/tokenizer.json", tmp_path)

    def no_address(*args: Any) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # set for all other tests
    monkeypatch.setattr("subspace_lab.data.hub.socket.getaddrinfo", no_address)
    monkeypatch.setattr("subspace_lab.data.hub.urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no-such/tokenizer.*SUBSPACE_DATA.*no network.*bytes"):
        load_tokenizer("no-such/tokenizer", tmp_path)
