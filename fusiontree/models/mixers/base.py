"""The interface of a mixer: everything that depends on the kind of a layer's branch.

A mixer is one class. The block calls its ``forward``; tensor parallelism, context parallelism, initialization, FLOPs,
the memory estimate, size checks, decoding caches and checkpoint converters ask its other methods.
``docs/extend/mixer.md`` adds a mixer step by step.

Shape legend: B rows, S tokens, C channels, D half the channels of an attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers.cache import MixerCache, NewTokens
from fusiontree.models.mixers.split import Split
from fusiontree.ops.documents import Documents
from fusiontree.utils.errors import UserError
from fusiontree.utils.settings import Section

HALF = (torch.bfloat16, torch.float16)


class MixerInputs(NamedTuple):
    """The token layout of a forward, for every mixer."""

    documents: Documents | None = None
    """Boundaries at which attention, convolution and state restart; None means each row is one document (with a filled
    cache: the continuation of the cached text)."""
    cos_BSD: Tensor | None = None
    """Rotary tables in fp32; B is 1 if all rows have the same positions."""
    sin_BSD: Tensor | None = None
    padding_mask_BS: Tensor | None = None
    """True on real tokens; None means there are no pads."""
    new: NewTokens | None = None
    """The tokens that this forward adds to the cache; None without a cache."""
    place_BSC: Tensor | None = None
    """Memory for the result of a mixer's ``output_projection``, beside that of the other branch; None: anywhere."""


class ContextTools(Protocol):
    """Communication between the ranks that hold the chunks of a sequence; see :mod:`fusiontree.parallel`."""

    def state_exchange(self, reached: Tensor, decay: Tensor) -> Tensor:
        """Return the state before this rank's chunk, by the recurrence ``state = decay * state + reached``.

        Args:
            reached: state after this chunk if it starts from zero, ``[B, H, …]``.
            decay: factor of the initial state over this chunk, with one or more leading axes of ``reached``; 0 where a
                document starts in the chunk.
        """

    def affine_exchange(self, reached: Tensor, transition: Tensor) -> Tensor:
        """Return the state before this rank's chunk, by the recurrence ``state = transition @ state + reached``.

        Args:
            reached: state after this chunk if it starts from zero, ``[B, H, K, V]``.
            transition: matrix that multiplies the initial state over this chunk, ``[B, H, K, K]``; 0 where a document
                starts in the chunk.
        """

    def left_context(self, inputs: Sequence[Tensor], length: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return ``inputs`` (use these; they carry the gradient) and, for each, the ``length`` tokens before the chunk.

        Inputs are ``[B, S, …]`` of one dtype; tokens before the start of the sequence are zeros.
        """

    def windowed_attention(self, core: Any) -> Any:
        """Return an attention core that receives the window's keys and values that precede the chunk."""

    def full_attention(self, core: Any) -> Any:
        """Return an attention core that sees the keys and values of the full sequence."""


class Activations(NamedTuple):
    """Elements per token that a mixer keeps for the backward pass on one tensor parallel rank, without its output."""

    expensive: float
    """Results of matrix products, attention and scans: kept under ``activation_checkpointing`` none and selective."""
    cheap: float
    """Results that :func:`fusiontree.ops.recompute.recomputed` marks: kept only under ``none``."""


class Seconds(NamedTuple):
    """Time per token, forward and backward, beyond matrix products; on one H100 in bf16."""

    kept: float
    """Work that recomputation of the full block does not repeat."""
    repeated: float


class Fp32Parameters(nn.Module):
    """Parameters that stay in fp32: engines keep them in fp32, and so does ``model.bfloat16()``.

    For values that half precision cannot represent accurately enough, such as decays near one.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return tensor.to(converted.device) if converted.dtype in HALF else converted

        return super()._apply(keep_precision, recurse)


class Mixer(nn.Module):
    """A branch of a layer: mixes along the tokens, ``[B, S, hidden_size]`` to ``[B, S, hidden_size]``.

    A subclass registers itself: ``MIXERS.register(MyMixer.name, MyMixer)``. Attributes of the class:

    - ``name``: its name in the configuration.
    - ``module_name``: name of its module in a block, ``layers.3.<module_name>``.
    - ``settings``: class of its settings, which are read from ``model.mixers.<name>``; None means it has none.
    - ``adds_time_encoding``: True to add the shared relative time encoding to its input.
    - ``weighed_as_second``: True if the gate weighs its output by 1 - g instead of g in a layer of this mixer alone.
    - ``no_decay``: names of parameters that weight decay leaves out; norms and biases always are.
    - ``output_projection``: name of its linear map that computes the result, in ``inputs.place_BSC``, by
      :func:`fusiontree.ops.linear.side_by_side.product_in`. Empty: the mixer ignores the place, and the block copies.
      Its initial values are smaller if no projection follows it.
    - ``fp8_products``: its linear maps that ``training.matmul_precision: fp8`` computes in FP8: the name of each module
      with ``mixer_in`` or ``mixer_out``, by which ``training.fp8.exclude`` names it. Empty: the mixer does not support
      FP8.
    """

    name: ClassVar[str]
    module_name: ClassVar[str]
    settings: ClassVar[type[Section] | None] = None
    adds_time_encoding: ClassVar[bool] = False
    weighed_as_second: ClassVar[bool] = False
    no_decay: ClassVar[tuple[str, ...]] = ()
    output_projection: ClassVar[str] = ""
    fp8_products: ClassVar[dict[str, str]] = {}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Create the parameters without values; ``layer`` is the layer's index."""
        super().__init__()

    def forward(self, u_BSC: Tensor, inputs: MixerInputs, cache: Any = None) -> Tensor:
        """Mix along the tokens.

        Args:
            u_BSC: input ``[B, S, hidden_size]``.
            inputs: documents, positions and padding of the tokens.
            cache: of :meth:`new_cache`; updated. None in training.

        Returns:
            ``[B, S, hidden_size]``; under tensor parallelism this rank's summand.
        """
        raise NotImplementedError

    def bf16_rows(self, product: str, rows: int) -> int:
        """Return how many of the last ``rows`` output channels of a module in ``fp8_products`` stay bf16."""
        return 0

    # Sizes

    @classmethod
    def section(cls, config: ModelConfig) -> Any:
        """Return the mixer's settings, an instance of ``settings``."""
        return (config.mixers or {})[cls.name]

    @classmethod
    def size_problems(cls, config: ModelConfig) -> Iterator[str]:
        """Yield the reasons why the mixer cannot have the configured sizes."""
        yield from ()

    @classmethod
    def tp_problems(cls, config: ModelConfig, tp: int) -> Iterator[str]:
        """Yield the reasons why the mixer cannot be split over ``tp`` > 1 ranks."""
        if not cls.tp_plan(config):
            yield f"mixer {cls.name} cannot be split (its tp_plan is empty)"

    # Parallelism

    @classmethod
    def tp_plan(cls, config: ModelConfig) -> dict[str, Split]:
        """Return the split of every parameter, by its name in the mixer; empty if the mixer cannot be split."""
        return {}

    def use_context_parallel(self, tools: ContextTools) -> None:
        """Keep the tools that :meth:`forward` needs when each rank holds a chunk of the sequence.

        Raises:
            UserError: the mixer cannot be split along the sequence.
        """
        raise UserError(f"mixer {self.name} does not support context parallelism; set parallel.cp to 1")

    @classmethod
    def exchanged_bytes(cls, config: ModelConfig, layer: int, tokens: float, cp: int, tp: int, itemsize: int) -> float:
        """Return the bytes that one rank receives under context parallelism in a forward of ``tokens`` tokens."""
        return 0.0

    # Parameters

    @classmethod
    def initial_values(
        cls, name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator
    ) -> Tensor | None:
        """Return initial values of consecutive rows of a parameter in fp32.

        None selects the model's rule: norms one, biases zero, others normal with ``initializer_range``.

        Args:
            name: of the parameter in the mixer, such as ``ssm.A_log``.
            shape: of the rows.
            config: of the model.
            generator: of all random draws.
        """
        return None

    # Costs

    @classmethod
    def matrix_parameters(cls, config: ModelConfig) -> int:
        """Return the number of parameters in matrix products; by default those of all ``nn.Linear``."""
        with torch.device("meta"):
            modules = list(cls(config, 0).modules())
        return sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))

    @classmethod
    def flops(cls, config: ModelConfig, layer: int, lengths: Sequence[int]) -> float:
        """Return the forward FLOPs per token beyond the matrix products, averaged over documents of ``lengths``."""
        raise NotImplementedError(f"mixer {cls.name} does not define flops")

    @classmethod
    def activations(cls, config: ModelConfig, tp: int) -> Activations:
        """Return what one token keeps for the backward pass; for the memory estimate."""
        raise NotImplementedError(f"mixer {cls.name} does not define activations")

    @classmethod
    def seconds(cls, config: ModelConfig, layer: int, length: int) -> Seconds | None:
        """Return the measured time in rows of one document of ``length`` tokens, tp = 1.

        None: :meth:`flops` at the rate of matrix products, which is a lower bound.
        """
        return None

    # Decoding

    def step_projections(self) -> tuple[nn.Module, ...]:
        """Return the linear maps of the input for which :meth:`step` expects the outputs, side by side.

        Empty: the mixer has no :meth:`step`, and a decoding step calls the block's forward.
        """
        return ()

    def step(self, projected_BM: Tensor, inputs: MixerInputs, cache: Any) -> Tensor:
        """Continue every row of a fixed cache by one token; return the input of :meth:`step_output`, ``[B, …]``.

        Its last launch must be a kernel (not a copy of memory), as the output projection may start before its end.

        Args:
            projected_BM: outputs of :meth:`step_projections`.
            inputs: positions of the tokens; ``inputs.new`` is set.
            cache: of :meth:`new_cache`, fixed; updated.
        """
        raise NotImplementedError(f"mixer {self.name} does not define step")

    def step_output(self) -> nn.Module:
        """Return the linear map from the result of :meth:`step` to the mixer's output."""
        raise NotImplementedError(f"mixer {self.name} does not define step_output")

    @classmethod
    def new_cache(cls, config: ModelConfig, layer: int, capacity: int, dtype: torch.dtype) -> MixerCache:
        """Return an empty decoding cache.

        Args:
            config: of the model.
            layer: index of the layer.
            capacity: expected tokens of the longest text; longer texts are allowed.
            dtype: of keys and values.
        """
        raise NotImplementedError(f"mixer {cls.name} does not define new_cache")
