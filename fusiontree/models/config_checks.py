"""Checks of the ``model`` section as a whole: settings that contradict each other. They need no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusiontree.models.config import ModelConfig


def check_model(config: ModelConfig, built_in: Collection[str]) -> None:
    """Check letters and sizes, including those of the built-in mixers in use; other mixers check their own.

    Args:
        config: the section; each of its settings alone is valid.
        built_in: letters of ``layer_pattern`` that ``letters`` cannot define.

    Raises:
        ValueError: settings contradict each other.
    """
    _check_letters(config.letters or {}, built_in)
    if config.layer_pattern is not None:
        _check_pattern(config, config.layer_pattern)
    _check_mixers(config, {name for names in config.branches for name in names})
    _check_mix(config)
    _check_letter_sizes(config)
    _check_widths(config)
    _check_windows(config)


def _check_letters(letters: dict[str, list[str]], built_in: Collection[str]) -> None:
    for letter, names in letters.items():
        if len(letter) != 1 or letter.isspace() or letter in built_in:
            raise ValueError(f"letters: '{letter}' must be one character other than {', '.join(built_in)}")
        if not 1 <= len(names) <= 2 or len(set(names)) < len(names):
            raise ValueError(
                f"letters: '{letter}' names the mixers {names}; a layer has one mixer or two different mixers, because "
                f"its gate weighs the first by g and the second by 1 - g"
            )


def _check_pattern(config: ModelConfig, pattern: str) -> None:
    letters = list(config.mixers_by_letter)
    wrong = sorted(set(pattern) - set(letters))
    if wrong:
        raise ValueError(
            f"layer_pattern '{pattern}' has {wrong}; use the letters {', '.join(letters[:-1])} and "
            f"{letters[-1]}, or define others under letters"
        )
    if len(pattern) != config.num_layers:
        raise ValueError(
            f"layer_pattern '{pattern}' names {len(pattern)} layers and num_layers is "
            f"{config.num_layers}; give one letter per layer"
        )


def _check_mixers(config: ModelConfig, names: Collection[str]) -> None:
    if "attention" in names:
        _check_heads(config)
    if "mamba2" in names:
        _check_mamba(config)


def _check_heads(config: ModelConfig) -> None:
    if config.head_dim is None and config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} does not divide by num_heads {config.num_heads}; set head_dim or "
            f"change one of them"
        )
    if config.attention_head_dim % 2:
        raise ValueError(f"head_dim {config.attention_head_dim} is odd; rotary positions need an even head_dim")
    if config.global_heads > config.num_heads:
        raise ValueError(f"global_heads {config.global_heads} is more than num_heads {config.num_heads}")
    if config.num_heads % config.kv_heads:
        raise ValueError(f"num_heads {config.num_heads} does not divide by num_kv_heads {config.kv_heads}")
    group = config.num_heads // config.kv_heads
    if config.local_heads % group or config.global_heads % group:
        raise ValueError(
            f"num_kv_heads {config.kv_heads} makes groups of {group} query heads, and {config.local_heads} local + "
            f"{config.global_heads} global heads do not divide by {group}: a group would mix both kinds; change "
            f"global_heads or num_kv_heads"
        )


def _check_mamba(config: ModelConfig) -> None:
    if config.d_inner % config.mamba.head_dim:
        raise ValueError(
            f"mamba.expand * hidden_size = {config.d_inner} does not divide by mamba.head_dim {config.mamba.head_dim}"
        )
    if config.mamba_heads % config.mamba.n_groups:
        raise ValueError(
            f"{config.mamba_heads} state space heads (mamba.num_heads or expand * hidden_size / mamba.head_dim) do not "
            f"divide by mamba.n_groups {config.mamba.n_groups}"
        )
    if config.d_inner % config.mamba.norm_groups:
        raise ValueError(
            f"{config.mamba_heads} state space heads * mamba.head_dim = {config.d_inner} does not divide by "
            f"mamba.norm_groups {config.mamba.norm_groups}"
        )


def _check_mix(config: ModelConfig) -> None:
    if config.use_alignment and not config.has_gate and config.mlp_input == "residual":
        raise ValueError(
            f"use_alignment: branch_mix {config.branch_mix} with mlp_input residual does not read the alignment; set "
            f"use_alignment to false"
        )
    for name in ("load_balance_coeff", "entropy_reg_coeff"):
        if getattr(config, name) and not config.has_gate:
            raise ValueError(
                f"{name} {getattr(config, name)} needs a gate, and branch_mix is {config.branch_mix}; set {name} to 0"
            )


def _check_letter_sizes(config: ModelConfig) -> None:
    known = config.mixers_by_letter
    for letter in config.letter_sizes or {}:
        if letter not in known:
            raise ValueError(f"letter_sizes: no layers have the letter '{letter}'; known are {', '.join(known)}")
        sized = config.of_letter(letter)
        try:
            _check_mixers(sized, known[letter])
        except ValueError as error:
            raise ValueError(f"letter_sizes.{letter}: {error}") from None


def _check_widths(config: ModelConfig) -> None:
    if config.srte_encoding == "sincos" and config.hidden_size % 2:
        raise ValueError(f"hidden_size {config.hidden_size} is odd; srte_encoding sincos needs an even hidden_size")
    if config.mlp_size < 1:
        raise ValueError(f"mlp_ratio {config.mlp_ratio} of hidden_size {config.hidden_size} gives no channels")
    if config.has_gate and config.gate_rank > config.hidden_size:
        raise ValueError(f"gate_rank {config.gate_rank} is more than hidden_size {config.hidden_size}")


def _check_windows(config: ModelConfig) -> None:
    if config.window_size_last is None:
        return
    if config.attention_type != "pyramidal":
        raise ValueError("window_size_last needs attention_type pyramidal; set that or remove window_size_last")
    if config.window_size_last < config.window_size:
        raise ValueError(
            f"window_size_last {config.window_size_last} is less than window_size {config.window_size}; a pyramid "
            f"widens with depth"
        )
