"""What ``fusiontree generate`` reads and prints: prompts from files and the terminal, results as text or JSON lines."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusiontree.utils.errors import UserError, nearest_file

if TYPE_CHECKING:
    from fusiontree.generation.decoding import GeneratedRow, Generation, NewToken


def read_line() -> str:
    """Return the next line of the input, empty at its end; a terminal's line can be edited and recalled."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().rstrip("\n")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets input() edit lines
    try:
        return input("> ")
    except EOFError:
        print(flush=True)
        return ""


def read_prompts(file: str) -> list[str]:
    """Return the prompts in a file; ``-`` is standard input.

    Raises:
        UserError: the file does not exist or is not UTF-8, or a JSON line has no prompt.
    """
    if file == "-":
        try:
            return [sys.stdin.buffer.read().decode("utf-8")]  # the text stream would change line ends
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: {error}") from None
    path = Path(file)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"prompt file '{file}' does not exist{nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file '{file}' cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        return [text]
    text = text.removeprefix("\ufeff")
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f"{file}, line {number}: not a JSON object with a text under 'prompt'")
        prompts.append(prompt)
    return prompts


class Printer:
    """Writes results to standard output as plain text, as JSON lines, or token by token."""

    def __init__(self, prompts: Sequence[str], seed: int, *, json_lines: bool, stream: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._json = json_lines
        self._stream = stream

    def heading(self, row: int) -> None:
        """Print a prompt, with a title if there are several prompts."""
        if len(self._prompts) > 1:
            print(f"--- prompt {row}, seed {self._seed + row}")
        print(self._prompts[row], end="", flush=True)

    def token(self, new: NewToken) -> None:
        """Print the text of a new token."""
        print(new.text, end="", flush=True)

    def row(self, row: int, prompt_tokens: int, result: GeneratedRow) -> None:
        """Print a result; under ``--stream`` only the end of its line is missing."""
        if self._json:
            values = {
                "prompt": self._prompts[row],
                "text": result.text,
                "finish_reason": result.finish_reason,
                "seed": self._seed + row,
                "prompt_tokens": prompt_tokens,
                "tokens": result.tokens,
                "logprobs": result.logprobs,
            }
            print(json.dumps(values, ensure_ascii=False), flush=True)
        elif self._stream:
            print(flush=True)
        else:
            self.heading(row)
            print(result.text, flush=True)


def summary(done: Sequence[Generation]) -> str:
    """Return a line with the numbers of tokens and their rates."""
    prompt_tokens = sum(generation.prompt_tokens for generation in done)
    new_tokens = sum(generation.new_tokens for generation in done)
    prefill_s = sum(generation.prefill_s for generation in done)
    decode_s = sum(generation.decode_s for generation in done)
    later = new_tokens - sum(len(generation.rows) for generation in done)
    line = f"{prompt_tokens} prompt tokens in {prefill_s:.2f} s ({prompt_tokens / prefill_s:,.0f} tokens/s), "
    line += f"{new_tokens} new tokens"
    if not later:
        return line
    graphed = sum(generation.graphed_steps for generation in done)
    how = f", {graphed} steps by CUDA graph" if graphed else ""
    return f"{line} in {decode_s:.2f} s ({later / decode_s:,.0f} tokens/s{how})"
