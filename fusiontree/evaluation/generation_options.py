"""Options of a request to continue a text, as tasks of lm-evaluation-harness write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusiontree.generation.sampling import SamplingConfig
from fusiontree.utils.errors import UserError, nearest

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the number of new tokens; the first that is given counts."""
FILTERS = ("top_k", "top_p", "min_p")
KNOWN = (*LENGTHS, *FILTERS, "until", "do_sample", "temperature", "repetition_penalty", "num_beams")


@dataclass(frozen=True)
class GenerationOptions:
    """Equal options can share a batch."""

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    """The text ends before them."""
    sampling: SamplingConfig

    @classmethod
    def of(cls, given: dict[str, Any], max_new_tokens: int) -> GenerationOptions:
        """Read a task's ``generation_kwargs``; ``max_new_tokens`` counts where they name no number.

        As in the harness, decoding is greedy unless ``do_sample`` is true, or absent with a ``temperature`` above 0.

        Raises:
            UserError: an option is unknown, or a value is wrong.
        """
        for name in given:
            if name not in KNOWN:
                hint = nearest(name, KNOWN)
                raise UserError(
                    f"generation_kwargs has '{name}', which is not supported{hint}; known are {', '.join(KNOWN)}"
                )
        if given.get("num_beams", 1) != 1:
            raise UserError(
                f"generation_kwargs has num_beams {given['num_beams']}; beam search is not supported, use 1"
            )
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UserError(f"generation_kwargs has until {until!r}; give texts that are not empty")
        lengths = [given[name] for name in LENGTHS if given.get(name) is not None]
        length = int(lengths[0]) if lengths else max_new_tokens
        if length < 1:
            raise UserError(f"generation_kwargs asks for {length} new tokens; it must be at least 1")
        return cls(length, tuple(dict.fromkeys(stops)), _sampling(given))


def _sampling(given: dict[str, Any]) -> SamplingConfig:
    temperature = float(given.get("temperature") or 0.0)
    do_sample = given.get("do_sample")
    penalty = float(given.get("repetition_penalty") or 1.0)
    if not (temperature > 0 if do_sample is None else do_sample):
        return SamplingConfig(greedy=True, repetition_penalty=penalty)
    filters = {name: given[name] for name in FILTERS if given.get(name)}  # 0 switches a filter off
    temperature = 1.0 if given.get("temperature") is None else temperature
    return SamplingConfig(temperature=temperature, repetition_penalty=penalty, **filters)
