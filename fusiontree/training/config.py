"""Settings of training: batch, optimizer, schedule, precision, validation and loss spikes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from fusiontree.optim.config import AdamWSettings, OptimizerSettings, validated_settings
from fusiontree.utils.settings import PathText, Section, setting


class ValidationConfig(Section):
    """Loss on ``data.validation`` during training."""

    interval: int = setting(0, "Steps between validations; 0 never validates.", unit="steps", ge=0)
    rows: int = setting(64, "Rows of seq_len per validation and dataset; 0 reads all.", ge=0)


class SpikeConfig(Section):
    """Detection of loss spikes and the reaction to them."""

    policy: Literal["off", "skip", "rewind"] = setting(
        "off",
        "On a loss spike: skip leaves the step's gradient out; rewind returns to the newest checkpoint and continues "
        "with the data after the spike.",
    )
    window: int = setting(
        128, "Losses that a new loss is compared with; detection starts with a quarter of them.", unit="steps", ge=8
    )
    threshold: float = setting(
        8.0, "Robust standard deviations above the window's median from which a loss is a spike.", gt=0
    )
    max_in_a_row: int = setting(
        5, "Spikes in a row that may be skipped, or rewinds to the same checkpoint, before the run stops.", ge=0
    )


class Fp8Config(Section):
    """Matrix products in FP8: inputs and weights are E4M3, results bf16 (docs/fp8.md)."""

    scaling: Literal["tensor", "row"] = setting(
        "tensor", "One scale per matrix, or one per row of each factor; powers of two, from the current values."
    )
    gradient_type: Literal["e4m3", "e5m2"] = setting(
        "e4m3", "Type of the gradient of a product's result: e4m3 is finer, e5m2 has the wider range."
    )
    exclude: list[Literal["mixer_in", "mixer_out", "align", "out_proj", "mlp", "gate"]] = setting(
        lambda: ["gate"],
        "Products that stay bf16: mixer_in and mixer_out are the projections of the branches, the others parts of the "
        "block. The head, the rows of B, C and dt, and the queries, keys, decay and beta of Gated DeltaNet always stay "
        "bf16.",
    )
    first_bf16_layers: int = setting(0, "Number of first layers whose products all stay bf16.", ge=0)
    last_bf16_layers: int = setting(0, "Number of last layers whose products all stay bf16.", ge=0)


class TrainingConfig(Section):
    """Batch, optimizer, schedule and precision."""

    renamed: ClassVar[dict[str, str]] = {"checkpointed_layers": "recompute_layers"}

    seq_len: int = setting(..., "Length of a row.", unit="tokens", ge=2)
    max_steps: int = setting(..., "Optimizer steps of the whole run.", unit="steps", ge=1)
    global_batch_size: int = setting(
        ..., "Rows of seq_len in one optimizer step, over all ranks; shorter curriculum rows count in proportion.", ge=1
    )
    micro_batch_size: int = setting(
        1, "Rows of seq_len that a rank computes at once; gradients of a step's micro-batches accumulate.", ge=1
    )
    curriculum: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = setting(
        None,
        "Stages [row length, steps] before seq_len is reached, e.g. [[4096, 10000], [8192, 5000]]; the number of "
        "tokens per step does not change.",
    )
    precision: Literal["bf16", "fp16", "fp32"] = setting(
        "bf16", "Type of activations and matrix products; master weights, reductions and optimizer are fp32."
    )
    matmul_precision: Literal["bf16", "fp8"] = setting(
        "bf16",
        "fp8 computes most matrix products of the blocks in FP8, with precision bf16; bf16 computes all in precision.",
    )
    fp8: Fp8Config = setting(Fp8Config, "Recipe of matmul_precision fp8.")
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto takes a GPU where there is one.")
    learning_rate: float = setting(3e-4, "Peak learning rate.", ge=0)
    min_lr_ratio: float = setting(0.1, "Final learning rate over the peak.", ge=0, le=1)
    warmup_steps: int = setting(0, "Steps of linear warm-up from 0.", unit="steps", ge=0)
    lr_scheduler: Literal["cosine", "linear", "wsd", "constant"] = setting(
        "cosine", "Shape after warm-up; wsd is constant, then falls linearly over decay_steps."
    )
    decay_steps: int | None = setting(
        None, "wsd: length of the fall. Absent means a tenth of max_steps, at most all after warm-up.", ge=1
    )
    weight_decay: float = setting(
        0.1, "Decoupled decay of matrices; norms, biases and A_log, D, dt_bias get none.", ge=0
    )
    max_grad_norm: float = setting(1.0, "Global norm to which gradients are clipped; 0 never clips.", ge=0)
    optimizer: SerializeAsAny[Annotated[OptimizerSettings, BeforeValidator(validated_settings)]] = setting(
        AdamWSettings, "Optimizer and its settings."
    )
    seed: int = setting(0, "Decides initial weights, data order and branch dropout.", ge=0)
    teacher: PathText | None = setting(
        None,
        "Run folder or checkpoint of a frozen model whose distribution the trained model is to reach: the loss becomes "
        "(1 - teacher_weight) x cross entropy + teacher_weight x divergence from the teacher.",
    )
    teacher_weight: float = setting(0.5, "Share of the divergence from the teacher in the loss.", gt=0, le=1)
    teacher_temperature: float = setting(
        1.0, "Divisor of both models' logits in the divergence, which is multiplied by its square.", gt=0
    )
    validation: ValidationConfig = setting(ValidationConfig, "Loss on held-out data.")
    activation_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = setting(
        "none",
        "full keeps a block's input and its global attention and recomputes the block in the backward pass; selective "
        "keeps matrix products, attention and scan and recomputes norms, convolutions and activations; offload is full "
        "with the inputs in CPU memory; auto measures two steps and chooses none, selective or full for each layer, as "
        "fast as memory_limit allows.",
    )
    memory_limit: float = setting(
        0.92,
        "activation_checkpointing auto: share of the device's memory that tensors may fill (on a CPU: of the free "
        "memory, divided among the processes of the machine). CUDA, NCCL and fragmentation need the rest.",
        gt=0,
        le=1,
    )
    recompute_layers: int | None = setting(
        None,
        "Apply activation_checkpointing to this number of layers, from the first. The remaining layers use selective "
        "if the mode is full or offload, and no recomputation if it is selective. Absent: all layers. No effect under "
        "auto.",
        ge=0,
    )
    cuda_graphs: Literal["auto", "on", "off"] = setting(
        "auto",
        "Record forward, backward and optimizer step on a GPU and replay them, so that steps do not wait for Python. "
        "auto records what can be recorded (ddp, fsdp2) and off nothing; on also lets the GPU execute both branches of "
        "a block at the same time, and fails where a step cannot be recorded.",
    )
    gate_target: float = setting(0.5, "Mean gate of a row that the load balance loss asks for.", ge=0, le=1)
    gate_margin: float = setting(0.1, "Distance from gate_target that costs nothing.", ge=0, le=1)
    max_skipped_steps: int = setting(
        20, "Steps in a row with a non-finite gradient that may be skipped before the run stops.", ge=0
    )
    spikes: SpikeConfig = setting(SpikeConfig, "Loss spikes.")
    exit_at_step: int | None = setting(
        None, "Save and stop after this step, as a stop signal would; the same command resumes.", unit="steps", ge=1
    )

    @property
    def row_lengths(self) -> dict[str, int]:
        """Lengths of the rows of all steps, in tokens, by the setting that gives the length."""
        stages = {f"stage {i} of training.curriculum": length for i, (length, _) in enumerate(self.curriculum or [])}
        return {"training.seq_len": self.seq_len, **stages}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.matmul_precision == "fp8" and self.precision != "bf16":
            raise ValueError(
                f"matmul_precision fp8 needs precision bf16, and precision is {self.precision}; set it to bf16, or "
                f"matmul_precision to bf16"
            )
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}")
        after_warmup = self.max_steps - self.warmup_steps
        if self.lr_scheduler == "wsd" and (self.decay_steps or 0) > after_warmup:
            raise ValueError(
                f"decay_steps {self.decay_steps} is more than the {after_warmup} steps after warm-up (max_steps "
                f"{self.max_steps}, warmup_steps {self.warmup_steps}), so that the rate would jump; use at most "
                f"{after_warmup}"
            )
        for length, steps in self.curriculum or []:
            if length < 2 or steps < 1:
                raise ValueError(f"curriculum stage [{length}, {steps}] needs a row length >= 2 and steps >= 1")
            if self.seq_len % length:
                raise ValueError(
                    f"curriculum row length {length} does not divide seq_len {self.seq_len}, so that the number of "
                    f"tokens per step would change; use a divisor of {self.seq_len}"
                )
        return self
