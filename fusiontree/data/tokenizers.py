"""Tokenizers: bytes, a Hugging Face ``tokenizer.json``, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.format import TOKENIZER_FILE, TokenizerInfo
from fusiontree.data.long_texts import PIECE_BYTES, count_dropped, encode_long
from fusiontree.data.tokenizer_file import raised_by_library, read_tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write

TOKENIZER_INFO = "tokenizer_info.json"
"""File that describes the tokenizer of a run or checkpoint."""
SMALLEST_BPE = 257
"""Vocabulary size of a byte-level BPE without merges: 256 bytes and the end-of-document token."""
_EOS = "<|endoftext|>"
"""End-of-document token of a BPE trained here."""


class Tokenizer(ABC):
    """Encodes texts for building shards and decodes generated tokens."""

    info: TokenizerInfo
    notes: Sequence[str] = ()
    """Sentences on settings of the tokenizer that were switched off, or that change texts."""

    @abstractmethod
    def encode_utf8(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens of each text, given as valid UTF-8, without the end-of-document token."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of one text; lone surrogates, which UTF-8 cannot hold, become ``?``."""
        return self.encode_utf8([text.encode("utf-8", errors="replace")])[0].tolist()

    def count_lost(self, text: bytes, tokens: np.ndarray) -> int:
        """Return how many of ``tokens`` stand for unknown text, or how many characters of ``text`` have no token."""
        return 0

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without end-of-document tokens."""

    def token_bytes(self) -> np.ndarray | None:
        """Return the bytes of text of each token by id, 0 for special tokens; None if a token alone does not say."""
        return None

    @property
    def changes_text(self) -> bool:
        """Whether the tokens of some texts decode to another text."""
        return False

    @property
    def eos_id(self) -> int:
        """The end-of-document token."""
        return self.info.eos_id

    def unknown_ids(self, vocab_size: int) -> list[int]:
        """Return the ids below ``vocab_size`` of a model that stand for no token, such as padding of its vocabulary."""
        return list(range(self.info.vocab_size, vocab_size))


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

    def token_bytes(self) -> np.ndarray:
        """Return 1 for each byte and 0 for the end of a document."""
        return np.append(np.ones(256, np.int64), 0)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text; invalid UTF-8 becomes the replacement character."""
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the tokenizers library; see :mod:`fusiontree.data.tokenizer_file` for what is applied."""

    def __init__(self, path: Path, name: str | None = None, eos: str | None = None, eos_id: int | None = None) -> None:
        """Load ``path``, a file or the folder that contains it; ``eos`` or ``eos_id`` is the end-of-document token.

        Without both, the files beside ``path`` and its special tokens decide.

        Raises:
            UserError: the file is missing, no tokenizer, or the end-of-document token is not found or not certain.
        """
        if path.is_dir() and (path / TOKENIZER_FILE).is_file():
            path = path / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(f"tokenizer '{path}' is no file; give 'byte', 'bpe:VOCAB_SIZE' or a tokenizer.json")
        self.file = read_tokenizer(path, eos, eos_id)
        self.backend: Any = self.file.backend
        self.path, self.notes = path, self.file.notes
        self.info = TokenizerInfo(
            kind="huggingface",
            name=name or path.stem,
            vocab_size=self.file.vocab_size,
            eos_id=self.file.eos_id,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            file=TOKENIZER_FILE,
        )

    def encode_utf8(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the tokens of each text, given as valid UTF-8; long texts are encoded in pieces.

        Raises:
            UserError: the tokenizer has no token for a text, or reads a text as a special token.
        """
        try:
            short = [text for text in texts if len(text) <= PIECE_BYTES]
            encodings = self.backend.encode_batch_fast(
                [text.decode("utf-8") for text in short], add_special_tokens=False
            )
            # array converts a list of numbers four times as fast as numpy.
            of_short = iter([np.frombuffer(array("I", e.ids), dtype=np.uint32) for e in encodings])
            del encodings
            found = [next(of_short) if len(t) <= PIECE_BYTES else encode_long(self.backend, t) for t in texts]
        except BaseException as error:
            if not raised_by_library(error):
                raise
            raise UserError(f"tokenizer '{self.path}' cannot encode a text: {error}") from error
        for index, text in enumerate(texts):
            if self.file.literal is not None and self.file.special[found[index]].any():
                found[index] = encode_long(self.file.literal, text)
            if (special := self.file.special[tokens := found[index]]).any():
                name = self.backend.id_to_token(int(tokens[special.argmax()]))
                raise UserError(
                    f"tokenizer '{self.path}' reads a text as its special token '{name}' (the text begins with "
                    f"{text[:60].decode('utf-8', errors='replace')!r}); remove it from the text, or use another "
                    "tokenizer"
                )
        return found

    def count_lost(self, text: bytes, tokens: np.ndarray) -> int:
        """See :class:`Tokenizer`."""
        if self.file.unknown_id is not None:
            return int(np.count_nonzero(tokens == self.file.unknown_id))
        return count_dropped(self.backend, text) if self.file.drops else 0

    def token_bytes(self) -> np.ndarray | None:
        """Return the bytes of each token of a byte-level vocabulary, whose characters stand for one byte each."""
        if not self.file.byte_level:
            return None
        added = self.backend.get_added_tokens_decoder()
        sizes = np.zeros(self.file.vocab_size, np.int64)
        for text, token in self.backend.get_vocab(with_added_tokens=True).items():
            sizes[token] = len(text.encode()) if token in added else len(text)
        sizes[self.file.special] = 0
        return sizes

    @property
    def changes_text(self) -> bool:
        """Whether the tokens of some texts decode to another text."""
        return self.file.changes_text

    def unknown_ids(self, vocab_size: int) -> list[int]:
        """Return the ids that stand for no token; a vocabulary may have gaps."""
        known = set(self.backend.get_vocab().values())
        return [token for token in range(vocab_size) if token not in known]

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
        special_tokens=[_EOS],
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
    tokenizer = HuggingFaceTokenizer(folder / TOKENIZER_FILE, name=info.name, eos_id=info.eos_id)
    if tokenizer.info.sha256 != info.sha256:
        raise UserError(f"{tokenizer.path} is not the tokenizer that made the dataset (its SHA-256 differs)")
    tokenizer.info = info  # name and end-of-document token as recorded in the dataset
    return tokenizer


def save_tokenizer(info: TokenizerInfo, source: Path, folder: Path) -> list[Path]:
    """Write what :func:`load_tokenizer` needs into ``folder`` and return the files; equal files stay as they are.

    Args:
        info: the tokenizer.
        source: the tokenizer's file, or the folder that contains it; not used if it has none.
        folder: to write to.

    Raises:
        UserError: ``folder`` has another tokenizer already, or ``info`` names a file that is no tokenizer's.
    """
    info.check(f"the dataset of tokenizer '{info.name}'")
    contents = {TOKENIZER_INFO: json.dumps(asdict(info), indent=1).encode()}
    if info.file:
        contents[TOKENIZER_FILE] = (source / TOKENIZER_FILE if source.is_dir() else source).read_bytes()
    for name, content in contents.items():
        path = folder / name
        if path.exists() and not _is_same(path, content):
            raise UserError(f"'{path}' belongs to another tokenizer than '{info.name}'; name another folder")
    for name, content in contents.items():
        if not (folder / name).exists():
            with atomic_write(folder / name, "wb") as file:
                file.write(content)
    return [folder / name for name in contents]


def _is_same(path: Path, content: bytes) -> bool:
    """Return whether a tokenizer's file has ``content``; the name in its description may differ."""
    found = path.read_bytes()
    if found == content or path.name != TOKENIZER_INFO:
        return found == content
    try:
        return json.loads(found) | {"name": ""} == json.loads(content) | {"name": ""}
    except (ValueError, TypeError):
        return False


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a run or checkpoint folder.

    Raises:
        UserError: the folder does not describe a tokenizer, or the tokenizer's file is missing or another one.
    """
    path = folder / TOKENIZER_INFO
    if not path.is_file():
        raise UserError(f"'{folder}' has no {TOKENIZER_INFO}, so its tokenizer is not known")
    try:
        info = TokenizerInfo(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); copy it from another checkpoint of the run") from error
    info.check(f"'{path}'")
    return tokenizer_of(info, folder)
