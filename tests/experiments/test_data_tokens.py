"""Token folders: what is in them, every way they are damaged, and builders that are interrupted or many."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

from experiments.runs import WrongInput
from experiments.text import corpus, tokens
from tests.experiments.test_data import WORDS, held_out, texts, write_jsonl


def test_tokens_round_trip_by_document(tmp_path: Path, built: tokens.Tokens) -> None:
    manifest = json.loads((built.folder / "manifest.json").read_text())
    tokenizer = tokens.load_tokenizer(built.folder / "tokenizer.json")
    for stream, apart, name in ((built.training, False, "training"), (built.held_out, True, "held_out")):
        expected = [text for text in texts(300) if held_out(text) is apart]
        ends = np.flatnonzero(stream == built.end)
        assert stream[-1] == built.end
        assert [tokenizer.decode(part.tolist()) for part in np.split(stream, ends + 1)[:-1]] == [f"{text}" for text in expected]
        assert manifest[f"{name}_documents"] == len(expected) == getattr(built, f"{name}_documents")
        assert manifest[f"{name}_tokens"] == len(stream)
    assert isinstance(built.training, np.memmap) and built.training.dtype == np.uint16 and manifest["dtype"] == "uint16"
    assert int(built.training.max()) < built.vocabulary == manifest["vocabulary"] <= 300
    for name, facts in manifest["files"].items():
        content = (built.folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    assert built.sha256 == manifest["files"]["training.bin"]["sha256"]
    source = tmp_path / "few.jsonl"
    file = {"name": "few.jsonl", "bytes": source.stat().st_size, "sha256": sha256(source.read_bytes()).hexdigest()}
    assert manifest["sources"] == [{"name": "few.jsonl", "licence": "as provided", "files": [file]}]
    assert str(tmp_path) not in json.dumps(manifest)


def test_tokens_do_not_depend_on_how_many_are_encoded_at_a_time(
    tmp_path: Path, jsonl: str, built: tokens.Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [len(batch) for batch in corpus.batched(corpus.read((jsonl,)), 7, 10**9)] == [7] * 42 + [6]
    small = corpus.batched(corpus.read((jsonl,)), 10**9, 50)
    assert max(sum(len(document.text) for document in batch[:-1]) for batch in small) < 50
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", 7)
    assert tokens.build(tmp_path / "seven", (jsonl,), 300).sha256 == built.sha256
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 50)
    assert tokens.build(tmp_path / "fifty", (jsonl,), 300).sha256 == built.sha256


def test_the_tokenizer_sees_only_the_first_training_documents(tmp_path: Path, jsonl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = tokens._train
    monkeypatch.setattr(tokens, "_train", lambda few, vocabulary: train((seen.append(text) or text for text in few), vocabulary))
    tokens.build(tmp_path / "few", (jsonl,), 300, tokenizer_documents=20)
    assert seen == [text for text in texts(300) if not held_out(text)][:20]


def test_max_tokens_cuts_the_same_stream(tmp_path: Path, jsonl: str, built: tokens.Tokens) -> None:
    short = tokens.build(tmp_path / "short", (jsonl,), 300, max_tokens=1001)
    assert len(short.training) == 1001 and np.array_equal(short.training, built.training[:1001])
    assert 1 <= short.held_out_documents < built.held_out_documents and short.training_documents < built.training_documents


def test_an_end_token_inside_a_text_is_text(tmp_path: Path) -> None:
    many = [f"{text} {tokens.END} more" for text in texts(200)]
    made = tokens.build(tmp_path / "made", (str(write_jsonl(tmp_path / "a.jsonl", many)),), 300)
    assert int((made.training == made.end).sum()) == made.training_documents


@pytest.mark.parametrize("vocabulary, kind", [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_the_type_follows_the_vocabulary(tmp_path: Path, jsonl: str, vocabulary: int, kind: type) -> None:
    assert tokens.token_type(vocabulary) == kind
    extra = {f"w{k}": k for k in range(1, vocabulary - 8)}
    known = {"</s>": 0, **extra, **{word: vocabulary - 8 + k for k, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(known, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "words.json"))
    made = tokens.build(tmp_path / "made", (jsonl,), 300, tokenizer=tmp_path / "words.json")
    assert made.training.dtype == made.held_out.dtype == kind and made.vocabulary == vocabulary
    assert int(made.training.max()) == vocabulary - 1 and made.end == 0
    first = next(text for text in texts(300) if not held_out(text)).split()
    assert made.training[: len(first) + 1].tolist() == [known.get(word, 1) for word in first] + [0]
    assert (made.folder / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()


def test_a_tokenizer_without_an_end_or_not_one_is_refused(tmp_path: Path, jsonl: str) -> None:
    Tokenizer(tokenizer_models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    (tmp_path / "no.json").write_text("{}")
    for name, message in (
        ("endless", "has no end token, one of"),
        ("no", "no.json is not a tokenizer.json"),
        ("gone", "gone.json cannot be"),
    ):
        with pytest.raises(WrongInput, match=message):
            tokens.build(tmp_path / "made", (jsonl,), 300, tokenizer=tmp_path / f"{name}.json")
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize("name", tokens.FILES)
def test_every_damaged_file_is_refused_by_name(built: tokens.Tokens, name: str) -> None:
    file = built.folder / name
    content = file.read_bytes()
    edited = bytearray(content)
    edited[len(edited) // 2] ^= 1
    for bad, message in ((content[:-2], f"{len(content) - 2} bytes instead of {len(content)}"), (bytes(edited), "its sha256 is not")):
        file.write_bytes(bad)
        with pytest.raises(WrongInput, match=rf"{name} is damaged \({message}.*; delete the folder .*built to build it again"):
            tokens.open_tokens(built.folder)
    assert tokens.open_tokens(built.folder, verify=False).sha256 == built.sha256  # only sizes are looked at
    file.write_bytes(content[:-2])
    with pytest.raises(WrongInput, match="is damaged"):
        tokens.open_tokens(built.folder, verify=False)
    file.unlink()
    with pytest.raises(WrongInput, match=rf"{name} is damaged \(it is missing\)"):
        tokens.open_tokens(built.folder)
    file.write_bytes(content)
    assert tokens.open_tokens(built.folder).sha256 == built.sha256


def test_a_damaged_manifest_is_refused(built: tokens.Tokens) -> None:
    file = built.folder / "manifest.json"
    text = file.read_text()
    facts = json.loads(text)
    for bad in (
        text[: len(text) // 2],
        "[]",
        "",
        json.dumps({k: v for k, v in facts.items() if k != "end"}),
        json.dumps({**facts, "files": 3}),
    ):
        file.write_text(bad)
        with pytest.raises(WrongInput, match=r"manifest.json is damaged \(.*delete the folder"):
            tokens.open_tokens(built.folder)
    file.write_text(json.dumps({**facts, "format": 1}))
    with pytest.raises(WrongInput, match="another version"):
        tokens.open_tokens(built.folder)
    file.unlink()
    with pytest.raises(WrongInput, match="is not a token folder: it has no manifest"):
        tokens.open_tokens(built.folder)


def test_a_folder_is_found_again_and_never_overwritten(tmp_path: Path, jsonl: str, built: tokens.Tokens) -> None:
    before = (built.folder / "training.bin").stat().st_mtime_ns
    moved = shutil.copy(jsonl, tmp_path / "few.jsonl.copy")
    assert tokens.build(built.folder, (jsonl,), 300).sha256 == built.sha256
    assert (built.folder / "training.bin").stat().st_mtime_ns == before
    for vocabulary, limit in ((301, None), (300, 10)):
        with pytest.raises(WrongInput, match="built holds tokens of other sources or settings"):
            tokens.build(built.folder, (jsonl,), vocabulary, max_tokens=limit)
    write_jsonl(Path(jsonl), texts(301))
    with pytest.raises(WrongInput, match="other sources"):
        tokens.build(built.folder, (jsonl,), 300)
    with pytest.raises(WrongInput, match="exists and is not a token folder"):
        tokens.build(tmp_path, (jsonl,), 300)
    assert Path(moved).exists()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, jsonl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.iterdir())
    for error, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), WrongInput)):

        def stop(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(tokens, "write_json", stop)
        with pytest.raises(seen):
            tokens.build(tmp_path / "made", (jsonl,), 300)
        assert sorted(tmp_path.iterdir()) == before


def test_concurrent_builders_agree(tmp_path: Path, reviews: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: tokens.tokens(300), range(4)))
    assert len({item.sha256 for item in made}) == 1
    assert [path.name for path in reviews.iterdir()] == ["movie-reviews-bpe300"]
    assert tokens.open_tokens(reviews / "movie-reviews-bpe300").sha256 == made[0].sha256 and tmp_path.exists()


def test_the_cache_of_an_earlier_version_is_rebuilt_and_a_damaged_one_refused(reviews: Path) -> None:
    folder = reviews / "movie-reviews-bpe300"
    folder.mkdir(parents=True)
    (folder / "training.bin").write_bytes(b"1234")
    (folder / "manifest.json").write_text(json.dumps({"vocabulary": 300, "training_tokens": 2, "sha256": "0"}))
    made = tokens.tokens(300)
    assert made.sha256 == tokens.tokens(300).sha256 and made.sources == ("movie-reviews",)
    training, apart = corpus.documents()
    assert (made.training_documents, made.held_out_documents) == (len(training), len(apart))
    assert all(text.endswith(" end") for text in training) and all(map(held_out, apart))
    (folder / "manifest.json").unlink()
    assert tokens.tokens(300).sha256 == made.sha256
    file = folder / "training.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(WrongInput, match="is damaged"):
        tokens.tokens(300)
