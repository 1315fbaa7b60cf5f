"""The host queues the next training step without waiting for the device to finish the previous step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.config.load import load_config
from fusiontree.engines import torch_engine
from fusiontree.train import train
from fusiontree.training import pipeline, step
from fusiontree.utils.device import Mark
from tests.end_to_end.runs import metrics, write_config

pytestmark = pytest.mark.xdist_group("training")


@pytest.mark.parametrize("spike_policy", ["off", "skip"])
def test_a_step_is_read_while_the_device_has_the_next(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spike_policy: str
) -> None:
    forwards = 0
    early: list[int] = []  # steps that were waited for

    def copy_to_host(values: torch.Tensor) -> Callable[[], list[float]]:
        queued = forwards

        def read() -> list[float]:
            # Counts are queued before a step's first forward, and the loss is judged before the step is applied.
            judged = spike_policy != "off" and values.numel() == 3
            if queued % 4 == 0 and queued == forwards and not judged and values.numel() != 5:
                early.append(queued // 4)
            return values.tolist()

        return read

    def forward(self: torch_engine.TorchEngine, *arguments: Any) -> object:
        nonlocal forwards
        forwards += 1
        return original(self, *arguments)

    original = torch_engine.TorchEngine.forward
    monkeypatch.setattr(torch_engine.TorchEngine, "forward", forward)
    monkeypatch.setattr(torch_engine, "copy_to_host", copy_to_host)
    monkeypatch.setattr(step, "copy_to_host", copy_to_host)
    settings = ["training.max_steps=9", "training.validation.interval=0", "checkpoint.save_interval=4"]
    config = load_config(str(write_config(tmp_path, data)), [*settings, f"training.spikes.policy={spike_policy}"])
    assert train(config) == 0
    assert forwards == 9 * 4
    # The first step, in which kernels are compiled, saves, and the last one.
    assert sorted(set(early)) == [1, 4, 8, 9]
    assert len(metrics(tmp_path / "run")) == 9


def test_a_step_lasts_from_the_end_of_the_one_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pause it lasts from its own beginning: neither the pause nor the host's head start are in its time."""
    measured: list[str] = []

    class Numbered(Mark):
        made = 0

        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            type(self).made += 1
            self.name = f"{type(self).__name__} {type(self).made}"

        def seconds_since(self, earlier: Mark) -> float:
            assert isinstance(earlier, Numbered)
            measured.append(f"{earlier.name} to {self.name}")
            return super().seconds_since(earlier)

    class Begin(Numbered):
        made = 0

    class End(Numbered):
        made = 0

    monkeypatch.setattr(pipeline, "Mark", Begin)
    monkeypatch.setattr(step, "Mark", End)
    settings = ["training.max_steps=6", "training.validation.interval=0", "checkpoint.save_interval=4"]
    assert train(load_config(str(write_config(tmp_path, data)), settings)) == 0
    begins = ["Begin 1", "Begin 2", "End 2", "End 3", "Begin 3", "End 5"]
    assert measured == [f"{begin} to End {number}" for number, begin in enumerate(begins, start=1)]
