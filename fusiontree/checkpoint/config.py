"""The ``checkpoint`` section: when training saves checkpoints and which it keeps."""

from __future__ import annotations

from fusiontree.utils.settings import PathText, Section, setting


class CheckpointConfig(Section):
    """Checkpoints go to RUN/checkpoints/step-XXXXXXXX; the last step of a run is always saved."""

    save_interval: int = setting(1000, "Steps between checkpoints; 0 saves only at the end.", unit="steps", ge=0)
    keep_last: int = setting(3, "Newest checkpoints to keep; 0 keeps all.", ge=0)
    keep_every: int = setting(0, "Keep every checkpoint whose step is a multiple of this; 0 keeps none extra.", ge=0)
    keep_best: int = setting(
        0, "Number of checkpoints with the lowest validation loss to keep, of those saved at a validated step.", ge=0
    )
    async_: bool = setting(
        True,
        "Copy the state to CPU memory (this rank's part of it) and write it while training continues.",
        alias="async",
    )
    resume_step: int | None = setting(
        None,
        "Accept that later checkpoints, which the run's records know of, are gone, if the newest one there is of this "
        "step; 0: there is none. Has no effect while no checkpoint is missing.",
        unit="steps",
        ge=0,
    )
    init_from: PathText | None = setting(
        None,
        "Run folder or checkpoint whose weights a new run starts from; step, data and schedule start anew. Not read "
        "once the run has a checkpoint.",
    )
    init_optimizer: bool = setting(False, "Take the optimizer's state from init_from as well.")
