"""One safetensors file: the model's weights under our names, and its configuration in the file's header."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fusiontree.convert.reader import MODEL, CheckpointSource, Stream, checked
from fusiontree.convert.safetensors_file import SafetensorsFile, write_safetensors
from fusiontree.utils.errors import UserError

_KEY = "fusiontree_model"


class WeightFile(CheckpointSource):
    """A file written by :func:`write`."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: it was not written here, or is damaged.
        """
        self._file = SafetensorsFile(path)
        if _KEY not in self._file.metadata:
            raise UserError(
                f"{path} does not say which model it holds; to start from another model's weights give --map FILE and "
                f"--config FILE"
            )
        self.config = {"model": json.loads(self._file.metadata[_KEY])}
        self.files = []
        self.entries = {MODEL + name: entry for name, entry in self._file.entries.items()}
        self.entries = checked(self.entries, self.model_config, str(path))

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._file.read(name.removeprefix(MODEL))


def write(path: Path, stream: Stream) -> None:
    """Write the file; moments and tokenizer are left out."""
    names = [name for name in stream.source.entries if name.startswith(MODEL)]
    entries = {name.removeprefix(MODEL): stream.entry(name) for name in names}
    metadata = {"format": "pt", _KEY: json.dumps(stream.source.config["model"])}
    write_safetensors(path, entries, lambda name: stream.read(MODEL + name), metadata)
