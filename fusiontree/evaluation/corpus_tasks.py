"""The tasks on text: perplexity on token shards and on text files, and loss by tokens of context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from fusiontree.data.answer_rows import AnswerRows
from fusiontree.data.batch import MicroBatch
from fusiontree.evaluation.scoring import (
    CorpusScore,
    answer_batches,
    score_batches,
    score_positions,
    score_text,
    text_rows,
)
from fusiontree.evaluation.tasks import Record, Setup
from fusiontree.evaluation.text_bytes import ByteCount
from fusiontree.utils.errors import UserError


class Perplexity:
    """Loss on the rows of datasets."""

    def check(self, setup: Setup) -> None:
        """Open the datasets."""
        setup.check_length(setup.seq_len)
        setup.datasets(setup.config.max_rows)

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per dataset."""
        byte_count = ByteCount(setup.tokenizer)
        for name, data in setup.datasets(setup.config.max_rows).items():
            score = score_batches(setup.scorer, data.micro_batches(), data.rows, byte_count)
            source = byte_count.source
            if source == "unknown" and data.source.bytes_per_token:
                score = replace(score, text_bytes=score.tokens * data.source.bytes_per_token)
                source = "dataset"
            labels = {"set": name} if name else {}
            sizes = {"data": data.source.place, "seq_len": setup.seq_len, "rows": data.rows}
            yield {**labels, **sizes, **_corpus(score, source)}


class TextFiles:
    """Loss on UTF-8 files."""

    def check(self, setup: Setup) -> None:
        """Read the files."""
        if not setup.config.text:
            raise UserError("the task text needs a file; give --text FILE")
        setup.check_length(setup.seq_len)
        for file in setup.config.text:
            setup.read_text(file)
        stride = _stride(setup)
        if not 1 <= stride <= setup.seq_len:
            raise UserError(f"stride {stride} is not between 1 and seq_len {setup.seq_len}; tokens would be left out")

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per file."""
        sizes = {"seq_len": setup.seq_len, "stride": _stride(setup)}
        byte_count = ByteCount(setup.tokenizer)
        for file in setup.config.text:
            tokens, size = setup.read_text(file)
            score = score_text(
                setup.scorer, tokens, **sizes, batch_size=setup.config.batch_size, size=size, byte_count=byte_count
            )
            yield {"file": file, **sizes, **_corpus(score, "tokens" if byte_count.is_exact else "file")}


class Positions:
    """Loss by the number of tokens before the predicted one, in buckets of powers of two.

    A model that uses long context has a lower loss where more tokens precede.
    """

    def check(self, setup: Setup) -> None:
        """Open the datasets and read the files."""
        setup.check_length(setup.seq_len)
        if self._has_data(setup):
            setup.datasets(setup.config.max_rows)
        for file in setup.config.text:
            setup.read_text(file)
        if not self._has_data(setup) and not setup.config.text:
            raise UserError("the task positions needs text, and the run has no data.validation; give --data or --text")

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per dataset or file, and bucket."""
        size = setup.config.batch_size
        if self._has_data(setup):
            for name, data in setup.datasets(setup.config.max_rows).items():
                yield from self._records(setup, data.source.place, name, data.rows, data.micro_batches())
        for file in setup.config.text:
            tokens, _ = setup.read_text(file)
            parts = zip(*text_rows(tokens, setup.seq_len, setup.seq_len), strict=True)
            answers = AnswerRows(*(torch.stack(part) for part in parts))
            batches = answer_batches(setup.scorer, answers, size)
            yield from self._records(setup, file, "", len(answers.labels_BS), batches)

    def _has_data(self, setup: Setup) -> bool:
        return bool(setup.config.data or setup.data_settings.get("validation"))

    def _records(
        self, setup: Setup, place: str, name: str, rows: int, batches: Iterable[MicroBatch]
    ) -> Iterator[Record]:
        table_RKN = score_positions(setup.scorer, batches, rows, setup.seq_len)
        for bucket, (nats_R, tokens_R) in enumerate(table_RKN.permute(1, 2, 0)):
            tokens = float(tokens_R.sum())
            if tokens:
                mean = float(nats_R.sum()) / tokens
                # Tokens of a row are not independent, so the error is that of a ratio of sums over rows.
                error = float((nats_R - mean * tokens_R).square().sum().sqrt()) / tokens
                yield {
                    "data": place,
                    "set": name,
                    "from": 2**bucket // 2 + 1,
                    "to": min(2**bucket, setup.seq_len),
                    "tokens": int(tokens),
                    "nats_per_token": mean,
                    "standard_error": error,
                    "perplexity": CorpusScore(mean, 1).perplexity,
                }


def _stride(setup: Setup) -> int:
    return setup.config.stride or max(1, setup.seq_len // 2)


def _corpus(score: CorpusScore, bytes_from: str) -> Record:
    return {
        "tokens": score.tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
        "bytes": score.text_bytes,
        "bytes_from": bytes_from,
    }
