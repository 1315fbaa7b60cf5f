"""Options of a build, and their checks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusiontree.data.build.corpus import CorpusOptions
from fusiontree.data.tokenizers import SMALLEST_BPE
from fusiontree.utils.errors import UserError


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build: inputs, tokenizer, output."""

    corpus: CorpusOptions
    output: Path
    tokenizer: str
    """byte | bpe:VOCAB_SIZE | path of a tokenizer.json."""
    eos: str | None = None
    validation_fraction: float = 0.0
    """Share of documents that go to OUTPUT/validation; the rest goes to OUTPUT/train."""
    shard_bytes: int = 64 << 20
    """Bytes of text per shard."""
    shuffle: bool = False
    """Shuffle the documents by the seed; during the build this needs disk space in OUTPUT for all of their text."""
    remove_duplicates: bool = False
    max_unknown: float = 0.01
    """Fraction of a shard's tokens that may stand for text unknown to the tokenizer."""
    bpe_sample_bytes: int = 256 << 20
    """Bytes of text to train a BPE on, from the beginning of the (shuffled) corpus."""
    seed: int = 0
    processes: int = 0
    """0 means one per core."""

    @property
    def splits(self) -> list[str]:
        """Folders inside OUTPUT, or "" for OUTPUT itself."""
        return ["train", "validation"] if self.validation_fraction else [""]

    @property
    def identity(self) -> dict[str, Any]:
        """All options that affect the dataset's content, besides the documents."""
        values = asdict(self)
        for key in ("processes", "output"):
            del values[key]
        return json.loads(json.dumps(values, default=str))

    def check(self) -> None:
        """Raise UserError if a value is not possible."""
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation fraction {self.validation_fraction} is outside [0, 1)")
        if not 0 <= self.max_unknown <= 1:
            raise UserError(f"--max-unknown {self.max_unknown} is outside [0, 1]; give a fraction of the tokens")
        if self.processes < 0:
            raise UserError(
                f"{self.processes} processes are not possible; give --processes a number from 1, or 0 for one per core"
            )
        if not self.shard_bytes > 0:
            raise UserError(f"a shard size of {self.shard_bytes} bytes is not possible; give --shard-mb more than 0")
        if self.eos and (self.tokenizer == "byte" or self.tokenizer.startswith("bpe:")):
            raise UserError(f"--eos {self.eos} is for a tokenizer.json; '{self.tokenizer}' has its own end of document")
        if not self.tokenizer.startswith("bpe:"):
            return
        size = self.tokenizer.removeprefix("bpe:")
        if not size.isdigit():
            raise UserError(
                f"tokenizer '{self.tokenizer}': '{size}' is not a vocabulary size; write for example bpe:32000"
            )
        if int(size) < SMALLEST_BPE:
            raise UserError(f"a byte-level BPE needs at least {SMALLEST_BPE} tokens; bpe:{size} is too small")
