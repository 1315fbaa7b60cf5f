"""Decoding cache and transformers' model classes. Shape legend: B rows, S new tokens, C channels, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig
from fusiontree.convert.hf_source.layers import (
    CausalConv,
    FusionTreeBlock,
    RMSNorm,
    SSMParameters,
    TimeEncoding,
    TokenLayout,
)
from fusiontree.ops.rotary.reference import rotary_tables

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments that mark several texts in a row


class FusionTreeCache:
    """Convolution inputs and state of each Mamba mixer, keys and values of each attention.

    All rows of a batch end in the same column; shorter texts are padded on the left.
    """

    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.columns = 0
        """Tokens per row, pads included."""
        self.first_B: Tensor | None = None
        """Column of each row's first real token."""
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens per row, pads included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row ``beam_idx[i]`` (beam search)."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._map(lambda tensor: tensor[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.first_B = None if self.first_B is None else change(self.first_B)
        self.layers = [{name: change(tensor) for name, tensor in layer.items()} for layer in self.layers]


class FusionTreePreTrainedModel(PreTrainedModel):
    """Initial values and the properties that transformers reads."""

    config_class = FusionTreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FusionTreeBlock"]
    _keep_in_fp32_modules_strict = ["ssm"]
    _is_stateful = True

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.base_model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.base_model.embed = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, CausalConv):
            bound = module.weight.shape[1] ** -0.5
            module.weight.uniform_(-bound, bound)
            module.bias.zero_()
        elif isinstance(module, SSMParameters):
            module.A_log.uniform_(1.0, 16.0).log_()
            module.D.fill_(1.0)
            dt = module.dt_bias.uniform_(math.log(0.001), math.log(0.1)).exp()
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif isinstance(module, TimeEncoding) and module.kind == "learnable":
            module.weight.normal_(0.0, std)


class FusionTreeModel(FusionTreePreTrainedModel):
    """Embedding, blocks, norm."""

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FusionTreeBlock(config, layer) for layer in range(config.num_layers))
        self.srte = TimeEncoding(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Return the normed hidden states.

        Args:
            input_ids: tokens ``[B, S]``.
            attention_mask: 1 on real tokens, 0 on pads; the real tokens of a row are contiguous.
            past_key_values: cache of an earlier call whose texts the tokens continue; updated in place.
            inputs_embeds: embedded tokens ``[B, S, C]`` instead of ``input_ids``.
            position_ids: not needed; if given, they must count the real tokens of each row from 0.
            use_cache: return a cache.
            output_hidden_states: also return the residual stream before every layer and after the final norm.
            return_dict: False returns a tuple.
            kwargs: ignored, except for :data:`PACKED`.

        Raises:
            ValueError: a row has several texts, or the mask does not fit the tokens and the cache.
        """
        packed = [name for name in PACKED if kwargs.get(name) is not None]
        if packed:
            raise ValueError(f"{packed[0]} marks several texts in a row; give each text a row of its own")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSC = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache = False  # recomputation would update a cache twice
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = FusionTreeCache(self.config.num_layers)
        elif cache is not None and not isinstance(cache, FusionTreeCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; pass the cache that a call returned")
        layout = self._lay_out(x_BSC, attention_mask, position_ids, cache)
        cos_BSD, sin_BSD = rotary_tables(layout.positions_BS, self.config.head_dim, self.config.rope_theta)
        srte_BSC = self.srte(layout.positions_BS, x_BSC.dtype)
        streams = []
        for layer, block in enumerate(self.layers):
            streams.append(x_BSC)
            x_BSC = block(x_BSC, srte_BSC, cos_BSD, sin_BSD, layout, None if cache is None else cache.layers[layer])
        x_BSC = self.norm(x_BSC)
        if cache is not None:
            cache.columns += x_BSC.shape[1]
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BSC,
            past_key_values=cache,
            hidden_states=(*streams, x_BSC) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()

    @staticmethod
    def _lay_out(
        x_BSC: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: FusionTreeCache | None
    ) -> TokenLayout:
        start, first_B = (0, None) if cache is None else (cache.columns, cache.first_B)
        layout = TokenLayout(*x_BSC.shape[:2], attention_mask, start, first_B, x_BSC.device)
        if cache is not None:
            if layout.real_BS is not None and not bool(layout.real_BS[:, -1].all()):
                raise ValueError(
                    "rows are padded on the right, so a text cannot be continued; use padding_side='left', or "
                    "use_cache=False for a single forward"
                )
            cache.first_B = layout.first_B
        if position_ids is not None:
            equal_BS = position_ids == layout.positions_BS
            if not bool((equal_BS if layout.real_BS is None else equal_BS[layout.real_BS]).all()):
                raise ValueError("position_ids are not those of one text per row; give each text a row of its own")
        return layout


class FusionTreeForCausalLM(FusionTreePreTrainedModel, GenerationMixin):
    """The language model: hidden states, head, loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        self.model = FusionTreeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward creates a FusionTreeCache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FusionTreeCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward: the tokens that the cache does not hold."""
        tokens: dict[str, Any] = {"input_ids": input_ids}
        if past_key_values is not None:
            # After inputs_embeds, input_ids holds only the new tokens.
            new = (attention_mask if attention_mask is not None else input_ids).shape[1] - past_key_values.columns
            tokens = {"input_ids": input_ids[:, -max(1, new) :]}
        elif inputs_embeds is not None:
            tokens = {"inputs_embeds": inputs_embeds}
        return tokens | {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1 if logits_to_keep is None else logits_to_keep,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return the logits ``[B, S, V]`` and, with ``labels``, the mean loss.

        ``labels`` are the input tokens, which are shifted here, with -100 on tokens without loss. ``logits_to_keep`` is
        the number of last tokens to compute logits for (0: all), or their indices. :class:`FusionTreeModel` describes
        the other arguments; ``kwargs`` go to the loss function.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **{name: kwargs.pop(name) for name in PACKED if name in kwargs},
        )
        hidden_BSC = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_BSC = hidden_BSC[:, logits_to_keep]
        elif logits_to_keep:
            hidden_BSC = hidden_BSC[:, -logits_to_keep:]
        logits_BSV = self.lm_head(hidden_BSC)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result if return_dict is not False else result.to_tuple()


__all__ = ["FusionTreeForCausalLM", "FusionTreeModel", "FusionTreePreTrainedModel"]
