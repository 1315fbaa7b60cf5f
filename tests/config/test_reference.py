"""docs/configuration.md lists every setting as the code declares it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree.config.describe import BEGIN, END, main, settings_markdown, with_current_tables
from fusiontree.config.load import field_section, section_type
from fusiontree.config.root import Config
from fusiontree.utils.errors import UserError
from fusiontree.utils.settings import Section

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def leaves(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all settings that are no sections."""
    found = []
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        nested = field_section(field)
        is_section = nested is not None and section_type(field.annotation) is field.annotation
        found += leaves(nested, f"{dotted}.") if is_section else [dotted]
    return found


def test_the_committed_page_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_current_tables(page), "run python -m fusiontree.config.describe docs/configuration.md"


def test_every_setting_has_one_row() -> None:
    rows = [line.split("|")[1].strip(" `") for line in settings_markdown().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(leaves())


def test_an_outdated_page_is_rewritten_and_the_text_around_the_tables_is_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main([str(page)])
    assert page.read_text() == f"before\n{BEGIN}\n\n{settings_markdown()}\n\n{END}\nafter\n"


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(UserError, match="has no line"):
        with_current_tables(f"before {BEGIN} and no end")
