"""The model type ``fusiontree`` of lm-evaluation-harness: a run folder or checkpoint, without conversion.

Under torchrun or Slurm each process holds the whole model and answers its part of the requests; the harness collects
the results. Importing this module registers the model type; it is also the entry point ``lm_eval.models``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Literal, cast

import lm_eval.models  # noqa: F401  the harness registers its own models only while no model is registered
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from fusiontree.checkpoint.load import find_checkpoint, load_model
from fusiontree.data.tokenizers import load_tokenizer
from fusiontree.evaluation.responder import Answered, Responder
from fusiontree.parallel.layout import Layout, gather_objects
from fusiontree.utils.device import choose_device, choose_dtype
from fusiontree.utils.environment import process_place
from fusiontree.utils.errors import UserError

TIMEOUT_S = 86_400.0
"""How long a rank waits for a rank with more or longer requests."""
REPORT_S = 30.0
"""Seconds between two lines on how many requests are answered."""


@register_model("fusiontree")
class FusionTreeLM(LM):
    """A checkpoint that answers the harness's requests."""

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 4,
        max_batch_size: int | None = None,
        max_length: int | str = 0,
        max_gen_toks: int | str = 256,
        padding_side: str = "left",
        seed: int | str = 0,
    ) -> None:
        """Load the model and, if there are several processes, join them.

        Args:
            checkpoint: a run folder (its newest checkpoint) or a checkpoint folder.
            device: auto, cpu or cuda; with several processes each takes the GPU of its local rank. None means auto.
            dtype: of the weights: auto, float32, bfloat16 or float16.
            batch_size: rows computed together; no automatic size.
            max_batch_size: of the harness's automatic batch size; without effect.
            max_length: see :class:`Responder`, as the other arguments.
            max_gen_toks: new tokens of a request that names no number.
            padding_side: of rows of log-likelihoods.
            seed: of sampled texts.

        Raises:
            UserError: an argument is wrong, or there is no checkpoint.
            CheckpointDamage: a file differs from its recorded hash.
        """
        super().__init__()
        given = {"batch_size": batch_size, "max_length": max_length, "max_gen_toks": max_gen_toks, "seed": seed}
        numbers = {name: _whole_number(name, value) for name, value in given.items()}
        place = process_place()
        wanted = device or "auto"
        if place.world_size > 1:
            wanted = wanted.partition(":")[0]  # the harness names cuda:0 for all processes
        self._device = choose_device(wanted, place.local_rank)
        self.folder = find_checkpoint(Path(checkpoint))
        self.dtype = choose_dtype(dtype, self._device)
        self.layout = Layout(self._device.type, TIMEOUT_S) if place.world_size > 1 else None
        self._rank, self._world_size = place.rank, place.world_size
        model, self.settings = load_model(self.folder, self._device, self.dtype)
        self.responder = Responder(
            model,
            load_tokenizer(self.folder),
            padding_side=cast(Literal["left", "right"], padding_side),
            **numbers,
        )

    def close(self) -> None:
        """Leave the other processes."""
        if self.layout is not None:
            self.layout.close()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of each continuation given its context."""
        pairs = [request.args for request in requests]
        scored = self.responder.loglikelihood(pairs, self._answered("loglikelihood", requests))
        return [(answer.logprob, answer.is_greedy) for answer in scored]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-probability of each text."""
        texts = [request.args[0] for request in requests]
        return self.responder.loglikelihood_rolling(texts, self._answered("loglikelihood_rolling", requests))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continue each context."""
        contexts = [request.args for request in requests]
        return self.responder.generate_until(contexts, self._answered("generate_until", requests))

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        info = self.responder.tokenizer.info
        return f"{info.name}-{info.sha256[:12]}"

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a row."""
        return self.responder.length

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuse: a pretrained model has no chat template.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.folder} has no chat template; run the tasks without --apply_chat_template")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results."""
        count = sum(parameter.numel() for parameter in self.responder.model.parameters())
        return {"model_num_parameters": count, "model_dtype": str(self.dtype), "model_revision": self.folder.name}

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's numbers, in rank order."""
        everyone = gather_objects(tensor.tolist(), self._group)
        return torch.tensor(everyone, dtype=tensor.dtype, device=tensor.device)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return every rank's object, in rank order, on rank ``dst``; None on the others."""
        everyone = gather_objects(obj, self._group)
        return everyone if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.layout is not None:
            self.layout.barrier()

    @property
    def _group(self) -> Any:
        return None if self.layout is None else self.layout.cpu_group

    def _answered(self, kind: str, requests: list[Instance]) -> Answered:
        """Return the function that reports and caches the answers of one call."""
        done, last = 0, time.monotonic()

        def on_answer(index: int, answer: Any) -> None:
            nonlocal done, last
            self.cache_hook.add_partial(kind, requests[index].args, answer)
            done += 1
            if self.rank == 0 and (now := time.monotonic()) - last > REPORT_S:
                last = now
                print(f"{kind}: {done} of {len(requests)} requests", file=sys.stderr, flush=True)

        return on_answer


def _whole_number(name: str, value: int | str) -> int:
    """Return an argument that the harness may give as text.

    Raises:
        UserError: it is no whole number.
    """
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{name} is '{value}'; give a whole number (an automatic batch size is not supported)"
        ) from None
