"""One rank as a process of its own: reads its part of some steps and writes down what it saw."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from fusiontree.data.config import DataConfig
from tests.data.batches import open_data, row_digests


def main(job: dict) -> None:
    """Do what ``job`` says; see ``run_ranks`` of test_elastic."""
    data = open_data(DataConfig.model_validate(job["config"]), job["rank"], job["size"], **job["kind"])
    seen: dict = {"rows": [], "hashes": [], "state": None}
    for batch, state in islice(data.steps(job["state"]), job["steps"]):
        seen["rows"].append(row_digests(batch))
        seen["hashes"].append(batch.tokens_hash)
        seen["state"] = state
    Path(job["output"]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
