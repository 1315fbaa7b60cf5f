"""Foreign tokenizer.json files: what they and the files beside them set is applied, switched off, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusiontree.data.build.verify import document_of_dataset
from fusiontree.data.format import read_dataset
from fusiontree.data.tokenizers import HuggingFaceTokenizer, load_tokenizer, save_tokenizer
from fusiontree.utils.errors import UserError
from tools.build_shards import main

END = "<|endoftext|>"


def byte_level(path: Path, change: Callable[[Any], object] = lambda t: None, end: str | None = END) -> Path:
    """Write a byte-level tokenizer without merges; ids 0 to 255 are bytes in the alphabet's order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    t = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if end:
        t.add_special_tokens([AddedToken(end, special=True)])
    change(t)
    t.save(str(path))
    return path


def special(*names: str) -> Callable[[Any], object]:
    return lambda t: t.add_special_tokens(list(names))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def plain(tmp_path: Path) -> list[int]:
    return HuggingFaceTokenizer(byte_level(tmp_path / "plain.json")).encode("some text of 23 letters")


def _bos(t: Any) -> None:
    from tokenizers import processors

    t.add_special_tokens(["<s>"])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda t: t.enable_truncation(4), "truncation to 4 tokens is switched off"),
        (lambda t: t.enable_padding(length=50), "padding is switched off"),
        (_bos, "post-processor adds 1 special token to a text"),
        (lambda t: setattr(t.model, "dropout", 0.5), "dropout 0.5 of merges is switched off"),
    ],
)
def test_settings_that_change_tokens_are_switched_off_with_a_note(
    tmp_path: Path, plain: list[int], change: Callable[[Any], object], note: str
) -> None:
    tokenizer = HuggingFaceTokenizer(byte_level(tmp_path / "t.json", change))
    assert tokenizer.encode("some text of 23 letters") == plain
    assert [n for n in tokenizer.notes if note in n], tokenizer.notes


def test_normalizers_that_change_text_are_named(tmp_path: Path) -> None:
    from tokenizers import normalizers

    path = byte_level(tmp_path / "t.json", lambda t: setattr(t, "normalizer", normalizers.Lowercase()))
    assert "do not give back capital letters:" in HuggingFaceTokenizer(path).notes[0]
    path = byte_level(tmp_path / "t.json", lambda t: setattr(t, "normalizer", normalizers.NFKC()))
    assert "characters with compatible forms" in HuggingFaceTokenizer(path).notes[0]
    assert not HuggingFaceTokenizer(byte_level(tmp_path / "t.json")).notes


def test_the_build_says_what_was_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = byte_level(tmp_path / "t.json", lambda t: t.enable_truncation(16))
    texts = tmp_path / "in.jsonl"
    texts.write_text(json.dumps({"text": "x" * 64}) + "\n")
    arguments = ["--input", str(texts), "--tokenizer", str(path), "--output", str(tmp_path / "d"), "--processes", "1"]
    assert main(arguments) == 0
    assert read_dataset(tmp_path / "d").tokens == 65
    assert "truncation to 16 tokens is switched off" in capsys.readouterr().out


def test_special_tokens_in_a_text_stay_characters(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(byte_level(tmp_path / "t.json", special("<|im_start|>")), eos=END)
    for text in (f"A{END}B", "<|im_start|>", f"{END}"):
        tokens = tokenizer.encode(text)
        assert len(tokens) == len(text) and max(tokens) < 256
        assert tokenizer.decode(tokens) == text


def test_an_ordinary_token_chosen_as_end_is_not_read_from_texts(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    ordinary = [AddedToken("</s>", special=False), AddedToken("<b>", special=False)]
    path = byte_level(tmp_path / "t.json", lambda t: t.add_tokens(ordinary), end=None)
    with pytest.raises(UserError, match=r"does not say which token ends a document.*--eos"):
        HuggingFaceTokenizer(path)
    tokenizer = HuggingFaceTokenizer(path, eos="</s>")
    assert tokenizer.eos_id == 256 and len(tokenizer.encode("a</s>")) == 5
    assert tokenizer.encode("<b>") == [257]  # other ordinary tokens stay
    again = HuggingFaceTokenizer(path, eos_id=256)  # as a worker and a run load it
    assert again.encode("a</s><b>") == tokenizer.encode("a</s><b>")


def test_a_unigram_model_does_not_read_its_special_pieces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "</s>ab")]
    t = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    t.add_special_tokens(["<unk>", "</s>"])
    t.save(str(tmp_path / "t.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "t.json")
    assert tokenizer.eos_id == 1
    assert tokenizer.encode("a</s>b") == [6, 2, 3, 4, 5, 7]


def test_a_model_that_must_read_a_special_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    t = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "word": 2}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(["[UNK]", "[SEP]"])
    t.save(str(tmp_path / "t.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"special token '\[SEP\]'.*'word \[SEP\]'"):
        tokenizer.encode("word [SEP]")


def companions(folder: Path, **files: Any) -> None:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"tokenizer_config": {"eos_token": "<b>"}}, "<b>"),
        ({"tokenizer_config": {"eos_token": {"content": "<b>", "lstrip": False}}}, "<b>"),
        ({"special_tokens_map": {"eos_token": "<b>"}}, "<b>"),
        ({"generation_config": {"eos_token_id": 257}}, "</s>"),
        ({"generation_config": {"eos_token_id": [258]}}, "<b>"),
        ({"tokenizer_config": {"eos_token": "<b>"}, "generation_config": {"eos_token_id": [257, 258]}}, "<b>"),
        ({"tokenizer_info": {"eos_id": 258}, "tokenizer_config": {"eos_token": END}}, "<b>"),
        ({"dataset": {"tokenizer": {"eos_id": 258}}}, "<b>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}}, "</s>"),
    ],
)
def test_files_beside_the_tokenizer_name_the_end(tmp_path: Path, files: dict[str, Any], end: str) -> None:
    path = byte_level(tmp_path / "tokenizer.json", special("</s>", "<b>"))
    companions(tmp_path, **files)
    assert HuggingFaceTokenizer(path).eos_id == {END: 256, "</s>": 257, "<b>": 258}[end]
    assert HuggingFaceTokenizer(tmp_path, eos=END).eos_id == 256  # the user's word comes first


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"several tokens can end a document: '<\|endoftext\|>' \(256, .*'</s>' \(257, .*--eos TOKEN"),
        (
            {"tokenizer_config": {"eos_token": END}, "special_tokens_map": {"eos_token": "</s>"}},
            "tokenizer_config.json.*special_tokens_map.json",
        ),
        ({"generation_config": {"eos_token_id": [256, 258]}}, "several tokens.*generation_config.json"),
        ({"tokenizer_config": {"eos_token": END}, "generation_config": {"eos_token_id": 257}}, "several tokens"),
        ({"tokenizer_config": {"eos_token": "<eos>"}}, "'<eos>', which tokenizer .* lacks"),
        ({"tokenizer_config": {"eos_token": 5}}, "5, which tokenizer .* lacks"),
        ({"generation_config": {"eos_token_id": 999}}, "999, which tokenizer .* lacks"),
        ({"generation_config": {"eos_token_id": True}}, "True, which tokenizer .* lacks"),
        ({"tokenizer_config": ["eos_token"]}, "is no JSON object"),
        ({"tokenizer_config": {"eos_token": END, "added_tokens_decoder": {"9": {"content": "</s>"}}}}, "say 9"),
        ({"tokenizer_config": {"eos_token": END}, "added_tokens": {"</s>": "x"}}, "cannot be read"),
    ],
)
def test_an_uncertain_end_is_an_error(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    path = byte_level(tmp_path / "tokenizer.json", special("</s>", "<b>"))
    companions(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        HuggingFaceTokenizer(path)


def test_the_post_processor_names_the_end(tmp_path: Path) -> None:
    from tokenizers import processors

    def change(t: Any) -> None:
        t.add_special_tokens(["[X]", "</s>"])
        t.post_processor = processors.TemplateProcessing(single="$A [X]", special_tokens=[("[X]", 257)])

    assert HuggingFaceTokenizer(byte_level(tmp_path / "t.json", change)).eos_id == 257


def test_settings_beside_the_tokenizer_that_are_not_applied_are_named(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "tokenizer.json")
    config = {"eos_token": END, "add_bos_token": True, "add_prefix_space": True, "do_lower_case": True}
    added = {"256": {"content": END}, "300": {"content": "<new>"}}
    companions(tmp_path, tokenizer_config=config | {"added_tokens_decoder": added})
    first, second = HuggingFaceTokenizer(path).notes
    assert "add_bos_token, add_prefix_space, do_lower_case of tokenizer_config.json" in first
    assert "1 tokens that files beside it add are not in tokenizer.json and not used ('<new>')" in second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["added_tokens"][0].update(id=300), "has id 300 in the file, and the tokenizers library reads 256"),
        (lambda v: v["model"]["vocab"].update({"!": 5}), "the tokens .* have the same id 5"),
        (lambda v: v.pop("model"), "it is no tokenizer.json"),
        (lambda v: v.update(normalizer={"type": "Nosuch"}), "cannot be read"),
        (lambda v: v.update(added_tokens=[]), "does not say which token ends a document"),
        (lambda v: v["model"].update(merges=[["q", "zz"]]), "cannot be read"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = edit(byte_level(tmp_path / "t.json"), change)
    with pytest.raises(UserError, match=message):
        HuggingFaceTokenizer(path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe{}", b"[" * 100_000, b"[]", b"null"):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            HuggingFaceTokenizer(tmp_path / "t.json")


def _letters(path: Path, unknown: str | None) -> Path:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {c: i for i, c in enumerate("abc \n")} | ({"<unk>": 5} if unknown else {})
    t = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    t.decoder = decoders.Fuse()
    t.add_special_tokens([*(["<unk>"] if unknown else []), "<eos>"])
    t.save(str(path))
    return path


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_text_that_the_tokenizer_lacks_is_counted_and_refused(
    tmp_path: Path, unknown: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a token for unknown text, and without: the model then leaves the characters out."""
    path = _letters(tmp_path / "t.json", unknown)
    (tmp_path / "in.txt").write_text("abc " * 20 + "xyz")
    arguments = ["--input", str(tmp_path / "in.txt"), "--tokenizer", str(path), "--processes", "1", "--output"]
    assert main([*arguments, str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert "lacks 3 pieces of text" in error and "in.txt" in error and "--max-unknown" in error
    assert main([*arguments, str(tmp_path / "e"), "--max-unknown", "0.1"]) == 0
    assert read_dataset(tmp_path / "e").statistics["unknown"] == 3
    assert "3 pieces of text were unknown to the tokenizer and lost" in capsys.readouterr().out


def test_a_model_that_cannot_encode_a_text_says_so(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    t = Tokenizer(models.Unigram([("a", 0.0)], byte_fallback=False))
    t.add_special_tokens(["<eos>"])
    t.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"cannot encode a text.*unk_id"):
        HuggingFaceTokenizer(tmp_path / "t.json").encode("b")


def test_long_texts_have_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusiontree.data import long_texts, tokenizers

    source = "".join(p.read_text() for p in sorted(Path(long_texts.__file__).parent.glob("*.py")))
    tokenizers.train_bpe([source], 600, tmp_path / "t.json")
    tokenizer = HuggingFaceTokenizer(tmp_path / "t.json")
    texts = [source[:60_000], "дом 漢字 😀 " * 3_000, " " * 50_000 + "x", "ab" * 30_000]
    whole = [tokenizer.encode(text) for text in texts]
    sizes: list[int] = []
    pieces = long_texts._pieces
    monkeypatch.setattr(long_texts, "PIECE_BYTES", 1 << 13)
    monkeypatch.setattr(tokenizers, "PIECE_BYTES", 1 << 13)
    monkeypatch.setattr(long_texts, "_pieces", lambda *a: [sizes.append(len(p[0])) or p for p in pieces(*a)])
    assert [tokenizer.encode(text) for text in texts] == whole
    assert len(sizes) > 8 and min(sizes) < 1 << 13


def test_runs_and_datasets_keep_what_was_chosen(tmp_path: Path) -> None:
    """The copy in a run has no files beside it; the recorded end counts, and the same switches apply."""
    path = byte_level(tmp_path / "tokenizer.json", lambda t: (special("</s>")(t), t.enable_truncation(3)))
    companions(tmp_path, tokenizer_config={"eos_token": "</s>"})
    (tmp_path / "in.txt").write_text("one text</s>")
    arguments = ["--input", str(tmp_path / "in.txt"), "--tokenizer", str(tmp_path), "--processes", "1"]
    assert main([*arguments, "--output", str(tmp_path / "d")]) == 0
    info = read_dataset(tmp_path / "d")
    assert info.tokenizer.eos_id == 257
    _, tokens = document_of_dataset(tmp_path / "d", info, 0)
    run = tmp_path / "run"
    run.mkdir()
    save_tokenizer(info.tokenizer, tmp_path / "d", run)
    loaded = load_tokenizer(run)
    assert [*loaded.encode("one text</s>"), loaded.eos_id] == tokens
    assert len(tokens) == 13 and np.max(tokens) == 257
    assert path.read_bytes() == (run / "tokenizer.json").read_bytes()
