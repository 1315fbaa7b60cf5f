from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusiontree.generation.text import TextStream
from fusiontree.utils.errors import UserError


def decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def cut(text: str, stops: list[str]) -> str:
    return text[: min([(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text])[1]]


@settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(st.binary(max_size=40), st.text("aé€😀\ufffd", max_size=15).map(str.encode)),
    stops=st.lists(st.text("aé€😀", min_size=1, max_size=3), max_size=3),
)
def test_pieces_join_to_the_whole_text_cut_at_the_first_stop(data, stops):
    stream = TextStream(decode_bytes, stops)
    pieces = [stream.push(token) for token in data] + [stream.finish()]
    whole = decode_bytes(list(data))
    assert stream.stopped == any(stop in whole for stop in stops)
    assert "".join(pieces) == stream.text == (cut(whole, stops) if stream.stopped else whole)


def test_a_character_is_handed_out_whole_and_only_then():
    stream = TextStream(decode_bytes)
    assert [stream.push(token) for token in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


def test_the_beginning_of_a_stop_string_waits_and_comes_out_when_it_is_none():
    stream = TextStream(decode_bytes, ["END"])
    assert [stream.push(token) for token in b"xENxEND."] == ["x", "", "", "ENx", "", "", "", ""]
    assert (stream.text, stream.stopped, stream.finish()) == ("xENx", True, "")
    stream = TextStream(decode_bytes, ["END"])
    assert [stream.push(token) for token in b"EN"] == ["", ""]
    assert (stream.finish(), stream.stopped) == ("EN", False)


@pytest.mark.parametrize(("stops", "text"), [(["cd", "bcde"], "ab"), (["cd", "bcd"], "a"), (["f", "de"], "abc")])
def test_the_stop_string_complete_first_ends_the_text(stops, text):
    stream = TextStream(decode_bytes, stops)
    for token in b"abcdef":
        stream.push(token)
    assert stream.text == text


@pytest.fixture(scope="module")
def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["der Bär fährt nach Köln 😀😀 日本語 日本語"] * 3, trainer)
    return tokenizer


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 299), max_size=25))
def test_byte_level_bpe_tokens_join_too(byte_level_bpe, tokens):
    tokens = [token for token in tokens if token < byte_level_bpe.get_vocab_size()]
    stream = TextStream(byte_level_bpe.decode)
    assert "".join([stream.push(token) for token in tokens] + [stream.finish()]) == byte_level_bpe.decode(tokens)


def test_a_leading_space_survives_when_the_prompt_is_given():
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    tokenizer.decoder = decoders.Metaspace()
    stream = TextStream(tokenizer.decode, context=[0])
    assert [stream.push(token) for token in (1, 2, 0)] == [" b", "c", " a"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string is empty"):
        TextStream(decode_bytes, ["a", ""])


def byte_fallback(tokens: list[int]) -> str:
    """As decoders with byte fallback: U+FFFD for each byte of a run of byte tokens that is not UTF-8 as a whole."""
    try:
        return bytes(tokens).decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(t) if t < 128 else "\ufffd" for t in tokens)


@pytest.mark.parametrize("text", ["ab 😀 cd", "é漢😀😀", "😀", "x\ufffdy"])
@pytest.mark.parametrize("stops", [[], ["😀"], ["c"]])
def test_decoders_that_write_several_replacement_characters_join_too(text, stops):
    stream = TextStream(byte_fallback, stops)
    for token in text.encode():
        stream.push(token)
    stream.finish()
    hit = any(stop in text for stop in stops)
    assert stream.stopped == hit
    assert stream.text == (cut(text, stops) if hit else text)


def test_an_incomplete_character_at_the_end_is_shown_once():
    stream = TextStream(byte_fallback)
    assert [stream.push(token) for token in b"a\xf0\x9f"] == ["a", "", ""]
    assert (stream.finish(), stream.text) == ("\ufffd\ufffd", "a\ufffd\ufffd")
