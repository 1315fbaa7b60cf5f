"""An engine from outside: the all-reduce engine of the guide, without a change of the product."""

from __future__ import annotations

import re

import pytest

from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.config.load import load_config
from fusiontree.config.plugins import load_plugins
from fusiontree.planning.cost_model import Hardware, estimate
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import ROOT, metrics
from tests.parallel.table import MODEL, REFERENCE, TOLERANCE, Cell
from tests.parallel.test_parity import ParityTable, check

GUIDE = ROOT / "docs" / "extend" / "engine.md"
PLUGIN = ROOT / "docs" / "extend" / "all_reduce_engine.py"

pytestmark = [pytest.mark.xdist_group("extend engine"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_plugins([str(PLUGIN)])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ParityTable:
    table = ParityTable(tmp_path_factory.mktemp("engine"), MODEL, steps=6, plugins=[str(PLUGIN)])
    table.run([REFERENCE, REFERENCE._replace(accumulation=4)])
    return table


CELLS = [Cell("all_reduce", 2), Cell("all_reduce", cp=2), Cell("all_reduce", tp=2)]


@pytest.mark.slow
def test_loss_and_gradient_norm_are_those_of_one_process(table: ParityTable) -> None:
    table.run(CELLS)
    check(table, CELLS)


def test_a_gradient_that_is_not_summed_is_seen(table: ParityTable) -> None:
    """The engine with its all-reduce taken out, as a plugin of its own."""
    source = PLUGIN.read_text()
    broken = table.folder / "broken.py"
    broken.write_text(source.replace("if mesh.size() > 1:", "if False:").replace('"all_reduce"', '"unsummed"'))
    assert broken.read_text() != source
    values = table.config.read_text()
    table.config.write_text(values.replace(str(PLUGIN), str(broken)))
    cell = Cell("unsummed", 2)
    table.run([cell])
    table.config.write_text(values)
    assert table.error(cell) > 10 * TOLERANCE


def test_a_run_moves_to_another_engine_and_back(table: ParityTable) -> None:
    """Saved under the plugin's engine, resumed by ddp, and again by the plugin's."""
    run = table.folder / "moved"
    common = ["checkpoint.save_interval=2", "checkpoint.keep_last=0"]
    stops = {2: "all_reduce", 4: "ddp", 6: "all_reduce"}
    jobs = [[*Cell(engine).overrides(), *common, f"training.exit_at_step={stop}"] for stop, engine in stops.items()]
    table.train(1, [(str(run), overrides, None) for overrides in jobs])
    for key in ("loss", "grad_norm"):
        assert metrics(run, key) == pytest.approx(metrics(table.run_dir(REFERENCE), key), rel=TOLERANCE)
    kinds = {name.split(".")[0] for name in CheckpointReader(run / "checkpoints" / "step-00000002").tensors}
    assert kinds == {"model", "optimizer"}


def test_checks_and_planner_know_its_specification() -> None:
    overrides = ["parallel.engine=all_reduce", "training.activation_checkpointing=full"]
    config = load_config(ROOT / "configs/bench/hybrid_7b_32k.yaml", overrides)
    plan = estimate(config.model, config.parallel, config.training, 8, Hardware())
    ddp = load_config(ROOT / "configs/bench/hybrid_7b_32k.yaml", ["parallel.engine=ddp", *overrides[1:]])
    assert plan.states_gib > 2 * estimate(ddp.model, ddp.parallel, ddp.training, 8, Hardware()).states_gib
    from fusiontree.parallel.validate import check_layout

    refused = load_config(ROOT / "configs/quickstart.yaml", ["parallel.engine=all_reduce", "parallel.offload=all"])
    with pytest.raises(UserError, match=r"offload all is not possible with parallel\.engine all_reduce"):
        check_layout(refused.model, refused.parallel, refused.training, 2)


def test_the_guide_quotes_the_example() -> None:
    """Each block of the guide stands in the file; ``...`` stands for lines that are left out."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    source = PLUGIN.read_text(encoding="utf-8")
    assert len(blocks) >= 3
    for block in blocks:
        for part in re.split(r"(?m)^ *\.\.\.\n", block):
            assert part.strip("\n") in source, part
