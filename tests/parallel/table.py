"""The parity table: one model, one seed, one dataset, many layouts; loss and gradient norm must be the same.

Packing is on and documents straddle pieces; A decays slowly and the initialisation is three times the usual, so that
state and documents that leak show; there are fewer groups and key/value heads than tensor parallel ranks, the window is
longer than a piece, gate losses and branch dropout are on, every step accumulates two micro batches.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

from tests.end_to_end.runs import CONFIG
from tests.tiny import changed

STEPS = 20
TOLERANCE = 1e-5
"""Relative, of loss and gradient norm at every step."""

ROWS = 8
MODEL = changed(
    CONFIG["model"],
    num_layers=4,
    layer_pattern="FMAF",
    num_heads=8,
    num_kv_heads=4,
    global_heads=4,
    head_dim=8,
    window_size=20,
    srte_encoding="learnable",
    mamba={"n_groups": 2, "norm_groups": 4, "chunk_size": 8, "dt_init_range": [0.05, 0.5]},
)
TRAINING: dict[str, Any] = {
    **CONFIG["training"],
    "max_steps": STEPS,
    "validation": {"interval": STEPS, "rows": 4},
    "global_batch_size": ROWS,
    # Away from the hinge's kink: gates start at 0.5, where a target of 0.5 leaves the gradient's sign to rounding.
    "gate_target": 0.45,
}


def _short(text: str) -> str:
    """Return text that is fit for a part of a file's name."""
    return text if len(text) <= 40 else f"{text.partition('{')[0]}{zlib.crc32(text.encode()):08x}"


_OF_THE_MODEL = ("model.", "training.teacher", "training.precision", "training.matmul_precision", "training.fp8")
"""Settings that decide what is computed; the reference has them too."""


class Cell(NamedTuple):
    """One layout of the table."""

    engine: str
    dp: int = 1
    cp: int = 1
    tp: int = 1
    checkpointing: str = "none"
    accumulation: int = 2
    extra: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.dp * self.cp * self.tp

    @property
    def name(self) -> str:
        """Name of the cell, fit for a folder."""
        extra = "".join("-" + _short(e.rpartition(".")[2].replace("=", "")) for e in self.extra)
        return f"{self.layout}-{self.checkpointing}-acc{self.accumulation}{extra}"

    @property
    def layout(self) -> str:
        """Engine and sizes."""
        return f"{self.engine}-dp{self.dp}-cp{self.cp}-tp{self.tp}"

    @property
    def reference(self) -> Cell:
        """The single process that computes the same model."""
        return REFERENCE._replace(extra=tuple(e for e in self.extra if e.startswith(_OF_THE_MODEL)))

    def overrides(self) -> list[str]:
        """Settings that make the cell of the common configuration."""
        return [
            f"parallel.engine={self.engine}",
            f"parallel.cp={self.cp}",
            f"parallel.tp={self.tp}",
            f"training.activation_checkpointing={self.checkpointing}",
            f"training.micro_batch_size={ROWS // self.dp // self.accumulation}",
            *self.extra,
        ]


REFERENCE = Cell("ddp", 1, 1, 1)
NOISE = Cell("ddp", 1, 1, 1, accumulation=4)
"""The reference with another accumulation: what rounding alone does."""

OTHER_MODEL = (
    "model.tie_word_embeddings=true",
    "model.mlp_activation=swiglu",
    "model.use_alignment=false",
    "model.attention_type=pyramidal",
    "model.srte_encoding=sincos",
)
NO_GATE = ("model.load_balance_coeff=0", "model.entropy_reg_coeff=0")
NORMED = ("model.branch_norm=true",)
MEAN = ("model.branch_mix=mean", "model.branch_norm=true", *NO_GATE)
CONCATENATED = ("model.branch_mix=concat", "model.branch_norm=true", *NO_GATE)
IN_TURN = (
    "model.branch_mix=sum",
    "model.mlp_input=residual",
    "model.use_alignment=false",
    "model.global_rope=false",
    *NO_GATE,
)
GATED_SUM = (
    "model.branch_mix=gated_sum",
    "model.mlp_input=residual",
    "model.use_alignment=false",
)
PRUNED = (
    "model.layer_pattern=FpqrF",
    "model.num_layers=5",
    'model.letters={"p":["mamba2","attention"],"q":["mamba2"],"r":["attention"]}',
    'model.letter_sizes={"p":{"num_heads":4,"num_kv_heads":2,"global_heads":2,"mamba_heads":4,"mamba_norm_groups":2,'
    '"mlp_size":41},"q":{"mamba_heads":6,"mamba_groups":1,"mamba_norm_groups":2},"r":{"num_heads":4,"num_kv_heads":2,'
    '"global_heads":0,"window_size":9}}',
)
"""Layers of different sizes, as in a pruned model."""
TEACHER = "RUN-OF-THE-REFERENCE"
"""Stands for the run folder of :data:`REFERENCE` in settings."""
TAUGHT = (f"training.teacher={TEACHER}", "training.teacher_weight=0.7", "training.teacher_temperature=2.0")
DELTA: dict[str, Any] = {
    "letters": {"G": ["gated_delta_net", "attention"], "D": ["gated_delta_net"]},
    "mixers": {
        "gated_delta_net": {
            "key_dim": 4,
            "value_dim": 8,
            "heads_per_key": 4,
            "chunk_size": 8,
            "A_init_range": [0.01, 0.02],
            "dt_init_range": [0.05, 0.5],
        }
    },
}
"""Gated DeltaNet of 8 value heads and 2 key heads, alone and beside attention."""
RECORDED = ("training.cuda_graphs=on",)
LAYOUTS = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (1, 1, 4)]
FAST = [
    Cell("fsdp2", 1, 2, 2, "selective"),
    Cell("fsdp2", 2, 1, 1),
    *(
        Cell(engine, *axis)
        for engine in ("ddp", "zero1", "zero2", "zero3")
        for axis in ((2, 1, 1), (1, 2, 1), (1, 1, 2))
    ),
]
"""Every engine along every axis; run by the fast suite."""
GROUPS: dict[str, list[Cell]] = {
    **{
        Cell(engine, *layout).layout: [Cell(engine, *layout, mode) for mode in ("none", "selective", "full")]
        for engine in ("fsdp2", "zero3")
        for layout in LAYOUTS
    },
    "ddp": [
        Cell("ddp", 2, 1, 2),
        Cell("ddp", 1, 2, 2, "full"),
        Cell("ddp", 2, 2, 1, "selective"),
        Cell("ddp", 1, 2, 2, "auto"),
        Cell("ddp", 1, 2, 2, extra=OTHER_MODEL),
    ],
    "zero1 and zero2": [
        Cell("zero1", 2, 1, 2),
        Cell("zero1", 2, 1, 2, extra=OTHER_MODEL),
        Cell("zero2", 1, 2, 2, "selective"),
        Cell("zero2", 2, 1, 2, "full"),
        Cell("zero2", 2, 1, 2, "auto"),
    ],
    "options of fsdp2": [
        Cell("fsdp2", 2, 1, 2, extra=("parallel.shard_size=2",)),
        Cell("fsdp2", 1, 2, 2, "full", extra=("parallel.reshard_after_forward=false",)),
        Cell("fsdp2", 1, 2, 2, "auto"),
        Cell("fsdp2", 1, 2, 2, extra=OTHER_MODEL),
    ],
    "options of zero3": [
        Cell("zero3", 2, 1, 2, extra=("parallel.zero3_persistence_threshold=200",)),
        Cell("zero3", 1, 2, 2, "full", extra=("parallel.offload=all",)),
        Cell("zero3", 1, 2, 2, "auto"),
        Cell("zero3", 1, 2, 2, extra=OTHER_MODEL),
    ],
    "mixes of branches": [
        Cell("fsdp2", 2, 1, 2, "full", extra=NORMED),
        Cell("ddp", 1, 2, 2, extra=MEAN),
        Cell("zero3", 1, 2, 2, extra=CONCATENATED),
        Cell("fsdp2", 1, 2, 2, "selective", extra=IN_TURN),
        Cell("zero3", 1, 2, 2, extra=GATED_SUM),
        Cell("fsdp2", 1, 2, 2, "selective", extra=CONCATENATED),
    ],
    "pruned models with a teacher": [
        Cell("zero3", 1, 2, 2, extra=(*PRUNED, *TAUGHT)),
        Cell("fsdp2", 1, 2, 2, "selective", extra=(*PRUNED, *TAUGHT)),
        Cell("fsdp2", 2, 1, 2, "full", extra=(*PRUNED, *TAUGHT)),
        Cell("fsdp2", 1, 4, 1, extra=TAUGHT),
        Cell("ddp", 1, 2, 2, extra=PRUNED),
        Cell("zero2", 2, 1, 2, extra=(*PRUNED, *TAUGHT)),
        Cell("zero1", 2, 2, 1, extra=TAUGHT),
        Cell("ddp", 2, 1, 2, extra=TAUGHT),
        Cell("fsdp2", 2, 1, 2, "auto", extra=TAUGHT),
        Cell("fsdp2", 4, 1, 1, extra=("model.tie_word_embeddings=true", *TAUGHT)),
    ],
    "recorded steps with a teacher": [
        Cell("ddp", *axis, extra=(*RECORDED, *TAUGHT)) for axis in ((2, 1, 1), (1, 1, 2))
    ],
    "recorded steps": [Cell("ddp", *axis, extra=RECORDED) for axis in ((2, 1, 1), (1, 2, 1), (1, 1, 2))],
    "eight ranks": [Cell("fsdp2", 2, 2, 2), Cell("zero3", 2, 2, 2), Cell("zero1", 2, 2, 2)],
}
"""The whole table; the cells of a group have one number of ranks and run in one start of processes."""
