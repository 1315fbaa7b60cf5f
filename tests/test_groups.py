"""Tests of one ``xdist_group`` run in one process: their fixtures, which train models, are built once."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("groups")
def test_groups_are_kept_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist appends the group to the test's name; where that fails, groups are split without a word."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("runs under --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
