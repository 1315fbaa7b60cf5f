"""Settings that have no effect in the configuration in which they are given: the run says so at its start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusiontree.config.root import Config
from fusiontree.data.config import is_remote
from fusiontree.models.config import ModelConfig
from fusiontree.utils.settings import Section

Rule = tuple[bool, str, str]
"""Whether it applies; the settings, separated by spaces; why they have no effect."""


def without_effect(config: Config, world_size: int) -> list[str]:
    """Return a sentence for every setting that differs from its default and has no effect in ``config``.

    Args:
        config: a valid configuration.
        world_size: number of processes.
    """
    rules = (*_training(config), *_model(config), *_data(config), *_rest(config, world_size))
    found = list(_mixers(config.model))
    for applies, names, reason in rules:
        for name in names.split() if applies else ():
            value, default = _value_and_default(config, name)
            if value != default:
                shown = value.model_dump(mode="json") if isinstance(value, Section) else value
                found.append(f"{name}={shown} has no effect: {reason}")
    return found


def _value_and_default(config: Config, dotted: str) -> tuple[Any, Any]:
    *parents, key = dotted.split(".")
    section: Any = config
    for parent in parents:
        section = getattr(section, parent)
    return getattr(section, key), type(section).model_fields[key].get_default(call_default_factory=True)


def _training(config: Config) -> Iterator[Rule]:
    training = config.training
    scheduler, steps = training.lr_scheduler, training.max_steps
    yield scheduler == "constant", "training.min_lr_ratio", "training.lr_scheduler constant keeps the peak rate"
    yield scheduler != "wsd", "training.decay_steps", f"training.lr_scheduler is {scheduler}, not wsd"
    yield (
        scheduler != "constant" and training.warmup_steps == steps,
        "training.lr_scheduler training.min_lr_ratio",
        "training.warmup_steps is all of max_steps",
    )
    yield (training.exit_at_step or 0) >= steps, "training.exit_at_step", f"the run ends at max_steps {steps}"
    mode = training.activation_checkpointing
    yield mode == "none", "training.recompute_layers", "nothing is recomputed"
    yield mode == "auto", "training.recompute_layers", "training.activation_checkpointing auto chooses the layers"
    yield mode != "auto", "training.memory_limit", f"training.activation_checkpointing is {mode}, not auto"
    yield training.teacher is None, "training.teacher_weight training.teacher_temperature", "there is no teacher"
    spikes = "training.spikes.window training.spikes.threshold training.spikes.max_in_a_row"
    yield training.spikes.policy == "off", spikes, "training.spikes.policy is off"
    yield (
        training.spikes.window // 4 >= steps,
        "training.spikes.policy",
        f"the first {training.spikes.window // 4} steps (a quarter of the window) are not judged",
    )
    yield training.matmul_precision != "fp8", "training.fp8", "training.matmul_precision is bf16"
    yield training.validation.interval == 0, "training.validation.rows", "training.validation.interval is 0"
    yield config.evaluation.interval == 0, "evaluation.training_tasks", "evaluation.interval is 0"
    stages = sum(count for _, count in training.curriculum or [])
    yield (
        stages >= steps,
        "training.seq_len",
        f"the curriculum's {stages} steps are the whole run of {steps}, and rows of seq_len are never reached",
    )
    yield (
        config.model.load_balance_coeff == 0,
        "training.gate_target training.gate_margin",
        "model.load_balance_coeff is 0",
    )


def _model(config: Config) -> Iterator[Rule]:
    model = config.model
    mixers = {name for names in model.branches for name in names}
    heads = "model.num_kv_heads model.head_dim model.global_heads model.window_size model.attention_type"
    heads += " model.global_rope"
    yield "attention" not in mixers, f"{heads} model.rope_theta", "no layer has attention"
    yield "mamba2" not in mixers, "model.mamba", "no layer has Mamba"
    yield not model.adds_time_encoding, "model.srte_encoding", "no layer has a recurrent branch"
    yield "gated_delta_net" not in mixers, "model.kernels.gated_delta", "no layer has Gated DeltaNet"
    gate = "model.gate_rank model.use_alignment model.drop_branch_prob model.load_balance_coeff model.entropy_reg_coeff"
    yield all(len(names) == 1 for names in model.branches), gate, "no layer has two branches"
    yield not model.has_gate, "model.gate_rank", f"model.branch_mix {model.branch_mix} has no gate"
    yield model.global_heads == 0, "model.global_rope", "there are no global heads"
    yield model.local_heads == 0, "model.window_size model.attention_type", "all heads are global"
    yield (
        model.kernels.ssd == "triton" and "mamba2" in mixers,
        "model.mamba.chunk_size",
        "model.kernels.ssd triton ignores it",
    )


def _mixers(model: ModelConfig) -> Iterator[str]:
    """Yield the sentences on ``model.mixers``, whose sections depend on the plugins."""
    used = {name for names in model.branches for name in names}
    for name, section in (model.mixers or {}).items():
        for key, field in type(section).model_fields.items():
            value, default = getattr(section, key), field.get_default(call_default_factory=True)
            reason = "" if name in used else f"no layer of model.layer_pattern has {name}"
            if (name, key) == ("gated_delta_net", "chunk_size") and model.kernels.gated_delta == "fla":
                reason = reason or "model.kernels.gated_delta fla ignores it"
            if reason and value != default:
                yield f"model.mixers.{name}.{key}={value} has no effect: {reason}"


def _data(config: Config) -> Iterator[Rule]:
    data = config.data
    sets = [*data.sources, *data.validation_sets.values()]
    piped = any(d.path.startswith("pipe:") for d in sets)
    at_url = any(is_remote(d.path) and not d.path.startswith("pipe:") for d in sets)
    cached = "data.cache_dir data.cache_size_gib data.prefetch_shards data.fetch_stall_s"
    yield not data.is_remote, cached, "no dataset is remote"
    yield not at_url, "data.storage_options", "no dataset is at a URL"
    yield not piped, "data.allow_pipe", "no dataset is a pipe: command"
    yield not data.shuffle, "data.shuffle_shards", "data.shuffle is false"
    yield data.num_workers == 0, "data.prefetch_steps", "data.num_workers is 0"
    yield data.on_damage == "stop", "data.max_skipped_rows", "data.on_damage is stop"
    yield data.fetch_attempts == 1, "data.fetch_wait_s", "data.fetch_attempts is 1"


def _rest(config: Config, world_size: int) -> Iterator[Rule]:
    training, checkpoint, logging = config.training, config.checkpoint, config.logging
    yield checkpoint.keep_last == 0, "checkpoint.keep_every checkpoint.keep_best", "checkpoint.keep_last 0 keeps all"
    yield training.validation.interval == 0, "checkpoint.keep_best", "the run never validates"
    yield checkpoint.init_from is None, "checkpoint.init_optimizer", "checkpoint.init_from names no checkpoint"
    for tracker, names in (("wandb", ("mode", "project", "entity", "name")), ("tensorboard", ("folder",))):
        settings = " ".join(f"logging.{tracker}.{name}" for name in names)
        yield tracker not in logging.trackers, settings, f"{tracker} is not in logging.trackers"
    alone = "there is one process"
    yield world_size == 1, "supervision.straggler_interval supervision.replica_check_interval", alone
    yield world_size == 1, "parallel.reshard_after_forward", alone
    supervision = config.supervision
    yield supervision.straggler_interval == 0, "supervision.straggler_factor", "supervision.straggler_interval is 0"
    replicas = world_size // (config.parallel.tp * config.parallel.cp) or 1
    rows = -(-training.global_batch_size // replicas)
    yield (
        training.micro_batch_size > rows,
        "training.micro_batch_size",
        f"a rank has {rows} of the {training.global_batch_size} rows per step, so micro-batches have {rows}; more "
        "would be filler",
    )


def idle_work(config: Config, world_size: int) -> list[str]:
    """Return a sentence where ranks compute filler rows, because the batch does not divide evenly."""
    training = config.training
    replicas = world_size // (config.parallel.tp * config.parallel.cp) or 1
    rows = -(-training.global_batch_size // replicas)
    micro = min(training.micro_batch_size, rows)
    computed = replicas * (-(-rows // micro) * micro)
    idle = computed - training.global_batch_size
    if not idle:
        return []
    return [
        f"{idle} of {computed} rows computed per step are filler: training.global_batch_size "
        f"{training.global_batch_size} is no multiple of {replicas} data parallel ranks x {micro} rows of a micro-batch"
    ]
