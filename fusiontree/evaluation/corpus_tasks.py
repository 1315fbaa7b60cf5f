"""The tasks on text: perplexity on token shards and on text files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fusiontree.evaluation.scoring import CorpusScore, score_dataset, score_text
from fusiontree.evaluation.tasks import Record, Setup
from fusiontree.utils.errors import UserError


class Perplexity:
    """Loss on the rows of datasets."""

    def check(self, setup: Setup) -> None:
        """Open the datasets."""
        setup.check_length(setup.seq_len)
        setup.datasets(setup.config.max_rows)

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per dataset."""
        for name, data in setup.datasets(setup.config.max_rows).items():
            score = score_dataset(setup.scorer, data, setup.tokenizer)
            labels = {"set": name} if name else {}
            yield {**labels, "data": data.source.place, "seq_len": setup.seq_len, "rows": data.rows, **_corpus(score)}


class TextFiles:
    """Loss on UTF-8 files."""

    def check(self, setup: Setup) -> None:
        """Read the files."""
        if not setup.config.text:
            raise UserError("the task text needs a file; give --text FILE")
        setup.check_length(setup.seq_len)
        for file in setup.config.text:
            read_text(setup, file)
        stride = _stride(setup)
        if not 1 <= stride <= setup.seq_len:
            raise UserError(f"stride {stride} is not between 1 and seq_len {setup.seq_len}; tokens would be left out")

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per file."""
        sizes = {"seq_len": setup.seq_len, "stride": _stride(setup)}
        for file in setup.config.text:
            tokens, size = read_text(setup, file)
            score = score_text(setup.scorer, tokens, **sizes, batch_size=setup.config.batch_size, size=size)
            yield {"file": file, **sizes, **_corpus(score)}


def read_text(setup: Setup, file: str) -> tuple[list[int], int]:
    """Return a file's tokens and its size in bytes.

    Raises:
        UserError: it cannot be read as UTF-8, or is too short to predict a token.
    """
    try:
        text = Path(file).read_bytes().decode("utf-8")  # reading it as text would change line ends
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text file '{file}' cannot be read as UTF-8: {error}") from None
    tokens = setup.tokenizer.encode(text)
    if len(tokens) < 2:
        raise UserError(f"text file '{file}' has {len(tokens)} tokens; at least 2 are needed to predict one")
    return tokens, len(text.encode())


def _stride(setup: Setup) -> int:
    return setup.config.stride or max(1, setup.seq_len // 2)


def _corpus(score: CorpusScore) -> Record:
    return {
        "tokens": score.tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
    }
