"""Tokenizers: bytes, a Hugging Face ``tokenizer.json``, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.format import TokenizerInfo
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_INFO = "tokenizer_info.json"
"""File that describes the tokenizer of a run or checkpoint."""
SMALLEST_BPE = 257
"""Vocabulary size of a byte-level BPE without merges: 256 bytes and the end-of-document token."""
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "[SEP]")


class Tokenizer(ABC):
    """Encodes texts for building shards and decodes generated tokens."""

    info: TokenizerInfo

    @abstractmethod
    def encode_utf8(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens of each text, given as valid UTF-8, without the end-of-document token."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of one text; lone surrogates, which UTF-8 cannot hold, become ``?``."""
        return self.encode_utf8([text.encode("utf-8", errors="replace")])[0].tolist()

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without end-of-document tokens."""

    @property
    def eos_id(self) -> int:
        """The end-of-document token."""
        return self.info.eos_id


class ByteTokenizer(Tokenizer):
    """Byte tokenizer: UTF-8 bytes are tokens 0 to 255; token 256 ends a document."""

    info = TokenizerInfo(
        kind="byte",
        name="byte",
        vocab_size=257,
        eos_id=256,
        sha256=hashlib.sha256(b"utf-8 bytes, eos 256").hexdigest(),
    )

    def encode_utf8(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return each text's bytes."""
        return [np.frombuffer(text, np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text; invalid UTF-8 becomes the replacement character."""
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the tokenizers library."""

    def __init__(self, path: Path, name: str | None = None, eos: str | None = None, eos_id: int | None = None) -> None:
        """Load ``path``; ``eos`` or ``eos_id`` is the end-of-document token; without both, common names are tried.

        Raises:
            UserError: the file is missing or not a tokenizer, or no end-of-document token is found.
        """
        from tokenizers import Tokenizer as Backend

        if not path.is_file():
            raise UserError(f"tokenizer '{path}' is no file; give 'byte', 'bpe:VOCAB_SIZE' or a tokenizer.json")
        try:
            self.backend: Any = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer '{path}' cannot be read: {error}") from error
        names = (eos,) if eos else _EOS_NAMES
        if eos_id is None:
            eos_id = next((i for i in map(self.backend.token_to_id, names) if i is not None), None)
        if eos_id is None:
            raise UserError(f"tokenizer '{path}' has none of the tokens {list(names)}; name its end with --eos TOKEN")
        self.path = path
        self.info = TokenizerInfo(
            kind="huggingface",
            name=name or path.stem,
            vocab_size=max(self.backend.get_vocab().values()) + 1,  # ids may have gaps
            eos_id=eos_id,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            file=TOKENIZER_FILE,
        )

    def encode_utf8(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens of each text, given as valid UTF-8."""
        encodings = self.backend.encode_batch_fast([text.decode("utf-8") for text in texts], add_special_tokens=False)
        # array converts a list of numbers four times as fast as numpy.
        return [np.frombuffer(array("I", e.ids), dtype=np.uint32) for e in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text, special tokens left out."""
        return self.backend.decode([int(t) for t in tokens], skip_special_tokens=True)


def train_bpe(texts: Iterable[str], vocab_size: int, output: Path) -> None:
    """Train a byte-level BPE on ``texts`` and save it as a tokenizer.json."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    assert vocab_size >= SMALLEST_BPE
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_EOS_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(output))


def open_tokenizer(name: str, eos: str | None = None) -> Tokenizer:
    """Return the tokenizer ``byte``, or the tokenizer in the ``tokenizer.json`` at path ``name``.

    Raises:
        UserError: the file is missing or not a tokenizer, or no end-of-document token is found.
    """
    return ByteTokenizer() if name == "byte" else HuggingFaceTokenizer(Path(name), eos=eos)


def tokenizer_of(info: TokenizerInfo, folder: Path) -> Tokenizer:
    """Return the tokenizer that ``info`` describes; its file, if any, is in ``folder``.

    Raises:
        UserError: the file is missing, or its hash differs from ``info``.
    """
    if info.kind == "byte":
        return ByteTokenizer()
    tokenizer = HuggingFaceTokenizer(folder / (info.file or TOKENIZER_FILE), name=info.name, eos_id=info.eos_id)
    if tokenizer.info.sha256 != info.sha256:
        raise UserError(f"{tokenizer.path} is not the tokenizer that made the dataset (its SHA-256 differs)")
    tokenizer.info = info  # name and end-of-document token as recorded in the dataset
    return tokenizer


def save_tokenizer(info: TokenizerInfo, source: Path, folder: Path) -> list[Path]:
    """Write what :func:`load_tokenizer` needs into ``folder`` and return the files.

    Args:
        info: the tokenizer.
        source: the tokenizer's file, or the folder that contains it; not used if it has none.
        folder: to write to.
    """
    written = [folder / TOKENIZER_INFO]
    with atomic_write(written[0]) as file:
        json.dump(asdict(info), file, indent=1)
    if info.file:
        written.append(folder / info.file)
        shutil.copyfile(source / info.file if source.is_dir() else source, written[1])
    return written


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a run or checkpoint folder.

    Raises:
        UserError: the folder does not describe a tokenizer.
    """
    path = folder / TOKENIZER_INFO
    if not path.is_file():
        raise UserError(f"'{folder}' has no {TOKENIZER_INFO}, so its tokenizer is not known")
    return tokenizer_of(TokenizerInfo(**json.loads(path.read_text())), folder)
