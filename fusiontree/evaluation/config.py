"""The ``evaluation`` section: tasks of ``python -m fusiontree.evaluate`` and their sizes."""

from __future__ import annotations

from typing import Literal

from fusiontree.utils.settings import PathText, Section, setting

Task = Literal["perplexity", "text", "needle", "copy", "recall"]


class EvaluationConfig(Section):
    """Tasks and their sizes; options of the command replace them."""

    tasks: list[Task] = setting(
        ["perplexity"],
        "perplexity on token shards, text (perplexity on text files), needle (find a pair in random tokens), copy "
        "(repeat random tokens), recall (answer for many pairs).",
        min_length=1,
    )
    data: PathText | None = setting(
        None, "Dataset folder for perplexity. Absent means every dataset of the run's data.validation."
    )
    text: list[PathText] = setting([], "UTF-8 files for the task text.")
    seq_len: int | None = setting(
        None, "Row length of perplexity and text. Absent means training.seq_len.", unit="tokens", ge=2
    )
    max_rows: int = setting(0, "Rows that perplexity reads, spread over the dataset; 0 reads all.", unit="rows", ge=0)
    stride: int | None = setting(
        None,
        "text: tokens that each row starts after the previous row; each token is scored with at least "
        "seq_len - stride tokens before it. Absent means seq_len / 2.",
        unit="tokens",
        ge=1,
    )
    lengths: list[int] | None = setting(
        None, "Row lengths of needle, copy and recall. Absent means seq_len alone.", unit="tokens", min_length=1
    )
    depths: list[float] = setting(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        "Position of the needle: 0 at the start of the row, 1 just before the question.",
        min_length=1,
    )
    alphabet: Literal["vocabulary", "data"] = setting(
        "vocabulary",
        "Tokens of needle, copy and recall: the whole vocabulary, or only those that occur in 64 rows of data (a "
        "model knows nothing of tokens that it was not trained on).",
    )
    rows: int = setting(16, "Rows of every cell of needle, copy and recall.", unit="rows", ge=1)
    needle_tokens: int = setting(4, "Tokens of the needle's key, and of its value.", unit="tokens", ge=1)
    recall_pairs: int = setting(8, "Number of pairs per row of recall.", ge=1)
    batch_size: int = setting(4, "Rows computed together.", unit="rows", ge=1)
    seed: int = setting(0, "Seed of the random tokens.")
