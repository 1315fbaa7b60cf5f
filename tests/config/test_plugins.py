"""A user's modules are imported before the configuration is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusiontree.config.load import load_config
from fusiontree.config.plugins import load_plugins
from fusiontree.plan import main as plan
from fusiontree.utils.errors import UserError
from fusiontree.utils.registry import Registry

PARTS: Registry[object] = Registry("part")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "my_part.py"
    file.write_text("import tests.config.test_plugins as t\nt.PARTS.register('mine', object())\n")
    monkeypatch.setattr(PARTS, "_parts", {})
    return file


def test_a_file_is_imported_once_however_it_is_spelled(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin.parent)
    load_plugins([str(plugin), "my_part.py", "./my_part.py"])
    assert PARTS.names() == ["mine"]


def test_a_dotted_name_is_imported(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(plugin.parent)
    monkeypatch.delitem(sys.modules, "my_part", raising=False)
    load_plugins(["my_part"])
    assert PARTS.names() == ["mine"]


def test_a_configuration_names_plugins(plugin: Path) -> None:
    config = load_config("configs/quickstart.yaml", [f"plugins=[{plugin}]"])
    assert config.plugins == [str(plugin)] and PARTS.names() == ["mine"]


def test_every_verb_takes_plugins(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["--config", "configs/quickstart.yaml", "--gpus", "1", "--plugin", str(plugin)]) == 0
    assert PARTS.names() == ["mine"]
    assert plan(["--config", "configs/quickstart.yaml", "--gpus", "1", "--plugin", "no/such.py"]) == 2
    assert "plugin 'no/such.py' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("import no_such_package", "No module named 'no_such_package'"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_plugin_that_fails_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    for _ in range(2):  # a failed import is no import
        with pytest.raises(UserError, match=f"broken.py' cannot be imported: .*{message}"):
            load_plugins([str(file)])


def test_a_module_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match=r"plugin 'no_such\.module' is no module on the path"):
        load_plugins(["no_such.module"])


def test_a_name_stands_for_one_part() -> None:
    registry: Registry[object] = Registry("mixer")
    part = registry.register("mamba2", object())
    assert registry.register("mamba2", part) is registry.get("mamba2") is part
    with pytest.raises(UserError, match="mixer 'mamba2' is registered twice"):
        registry.register("mamba2", object())
    with pytest.raises(UserError, match=r"unknown mixer 'mamba'.*mamba2.*--plugin"):
        registry.get("mamba")
