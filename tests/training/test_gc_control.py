"""Objects that exist at the start are exempt from garbage collection; later objects are collected."""

from __future__ import annotations

import gc
import weakref

from fusiontree.utils import gc_control


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def test_later_rings_are_collected_and_earlier_ones_wait() -> None:
    gc_control.unfreeze()
    gc.collect()
    old = Ring()
    seen_old = weakref.ref(old)
    gc_control.freeze()
    try:
        seen_new = weakref.ref(Ring())
        del old
        gc.collect()
        assert seen_new() is None
        assert seen_old() is not None
        assert gc.get_freeze_count() > 1000
    finally:
        gc_control.unfreeze()
    gc.collect()
    assert seen_old() is None
