"""A mixer from outside: gated linear attention of the guide under new letters, without a change of the product."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fusiontree.checkpoint.load import load_model
from fusiontree.cli.convert_checkpoint import main as convert
from fusiontree.config.load import load_config
from fusiontree.config.plugins import load_plugins
from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import forward_flops_per_token, matrix_parameters
from fusiontree.models.initialization import no_weight_decay
from fusiontree.models.mixers import mixer_class
from fusiontree.models.mixers.base import Mixer, MixerInputs
from fusiontree.ops.documents import Documents
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.validate import check_layout, tp_problems, valid_tp
from fusiontree.plan import main as plan
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import ROOT, metrics, train
from tests.helpers import tiny_config, tiny_model
from tests.parallel.table import MODEL, REFERENCE, TOLERANCE, Cell
from tests.parallel.test_parity import ParityTable, check, check_seen

GUIDE = ROOT / "docs" / "extend" / "mixer.md"
PLUGIN = ROOT / "docs" / "extend" / "gated_linear_attention.py"
load_plugins([str(PLUGIN)])

LETTERS = {"G": ["gla", "attention"], "L": ["gla"], "B": ["attention", "gla"]}
GLA = {"heads": 4, "key_dim": 4, "value_dim": 8, "decay_range": [0.99, 0.999], "chunk_size": 7}
SHAPE = {"letters": LETTERS, "mixers": {"gla": GLA}}

pytestmark = [pytest.mark.xdist_group("extend mixer"), pytest.mark.timeout(1200)]


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


# One model under every layout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ParityTable:
    """Packed documents, slow decay, no Mamba: what is lost between chunks can only be the state of the new mixer.

    Ten steps with a larger norm_eps. A query may be orthogonal to the keys of a document's first tokens; the norm then
    divides by almost zero, and rounding of one process alone moves a gradient norm by 1e-4.
    """
    model = {**MODEL, "layer_pattern": "GLAB", "norm_eps": 1e-3, **SHAPE}
    return ParityTable(tmp_path_factory.mktemp("mixer"), model, steps=10, plugins=[str(PLUGIN)])


CELLS = [Cell("fsdp2", 1, 1, 2), Cell("fsdp2", 1, 2, 1, "full"), Cell("zero3", 2, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.layout)
def test_layouts_have_the_loss_and_gradient_norm_of_one_process(table: ParityTable, cell: Cell) -> None:
    if cell.engine == "zero3":
        pytest.importorskip("deepspeed")
    table.run([REFERENCE])
    table.run([REFERENCE._replace(accumulation=4)])
    table.run([cell])
    check(table, [cell])


def test_a_state_that_is_not_passed_on_is_seen(table: ParityTable) -> None:
    table.run([REFERENCE])
    check_seen(table, ["state not passed"])


# Saved, resumed, exported


def test_a_run_is_saved_and_resumed(table: ParityTable, tmp_path: Path) -> None:
    table.run([REFERENCE])
    overrides = [f"run_dir={tmp_path / 'run'}", *REFERENCE.overrides()]
    for more in (["training.exit_at_step=6"], []):
        done = train(table.config, *overrides, *more)
        assert done.returncode == 0, done.stderr
    for key in ("loss", "grad_norm"):
        resumed, whole = metrics(tmp_path / "run", key), metrics(table.run_dir(REFERENCE), key)
        assert resumed == pytest.approx(whole, rel=TOLERANCE)


def test_a_checkpoint_is_exported_to_safetensors(
    table: ParityTable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from safetensors import safe_open

    table.run([REFERENCE])
    run = table.run_dir(REFERENCE)
    target = tmp_path / "weights.safetensors"
    options = ["--plugin", str(PLUGIN)]
    assert convert([str(run), str(target), "--to", "safetensors", "--dtype", "bf16", *options]) == 0
    weights = dict(load_model(run)[0].named_parameters())
    with safe_open(target, "pt") as file:
        assert set(file.keys()) == set(weights)
        for name, parameter in weights.items():
            dtype = torch.float32 if name.endswith("gla.decay.bias") else torch.bfloat16
            assert torch.equal(file.get_tensor(name), parameter.detach().to(dtype)), name
    assert convert([str(target), str(tmp_path / "again.safetensors"), "--to", "safetensors"]) == 0
    assert convert([str(run), str(tmp_path / "hf"), "--to", "hf"]) == 2
    assert "no mixers of the layers B, G, L" in capsys.readouterr().err


# Decoding


@pytest.mark.parametrize("pattern", ["GLAB", "LL"])
@torch.no_grad()
def test_token_by_token_equals_the_full_pass(pattern: str) -> None:
    model = tiny_model(layer_pattern=pattern, **SHAPE)
    ids = tokens(2, 24)
    full = model(ids).logits_BSV
    assert full.std() > 0.1
    for fixed in (False, True):
        cache = model.new_cache(2)
        parts = [model(ids[:, :9], cache=cache).logits_BSV]
        if fixed:
            cache.fix(24)
            model(ids[:, :1], cache=cache.rehearsal())  # changes nothing
        parts += [model(ids[:, i : i + 1], cache=cache).logits_BSV for i in range(9, 24)]
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_pads_and_selected_rows_do_not_change_a_text() -> None:
    model = tiny_model(layer_pattern="GL", **SHAPE)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6] = False
    cache = model.new_cache(2)
    model(ids, padding_mask_BS=mask, cache=cache)
    again = model(ids[:1, :1], cache=cache.select([1])).logits_BSV[0, -1]
    alone = model(torch.cat([ids[1:, 6:], ids[:1, :1]], 1)).logits_BSV[0, -1]
    torch.testing.assert_close(again, alone, atol=5e-5, rtol=1e-4)


# The recurrence


def test_the_scan_follows_the_recurrence() -> None:
    import sys

    module = sys.modules[mixer_class("gla").__module__]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 24, 3, 4, generator=generator)
    v = torch.randn(2, 24, 3, 5, generator=generator)
    log_decay = -0.1 * torch.rand(2, 24, 3, 4, generator=generator)
    positions = torch.arange(24).repeat(2, 1)
    positions[:, 10:] -= 10
    positions[1, 3:10] -= 3
    state, outputs = torch.zeros(2, 3, 4, 5), []
    for t in range(24):
        state = torch.where((positions[:, t] == 0)[:, None, None, None], 0.0, state)
        state = state * log_decay[:, t].exp()[..., None] + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
    segments = Documents.from_positions(positions).segments_BS
    for chunk_size in (1, 7, 24):
        y, last, _ = module.scan(q, k, v, log_decay, segments, chunk_size)
        torch.testing.assert_close(y, torch.stack(outputs, 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-5)


# Costs, sizes, parameters


def test_flops_are_counted() -> None:
    config = tiny_config(layer_pattern="LA", **SHAPE)
    rest = tiny_config(layer_pattern="AA", **SHAPE)
    keys, values, hidden = 4 * 4, 4 * 8, 32
    gla, attention = hidden * (3 * keys + 3 * values), hidden * 2 * (4 + 2) * 8
    assert matrix_parameters(config) - matrix_parameters(rest) == gla - attention
    more = forward_flops_per_token(config, 20) - 2 * matrix_parameters(config)
    less = forward_flops_per_token(rest, 20) - 2 * matrix_parameters(rest)
    assert more - less / 2 == pytest.approx(5 * 4 * 4 * 8)


@pytest.mark.parametrize(("heads", "keys", "values", "chunk", "hidden"), [(4, 32, 64, 16, 128), (8, 64, 64, 16, 256)])
def test_the_memory_estimate_is_what_autograd_keeps(
    heads: int, keys: int, values: int, chunk: int, hidden: int
) -> None:
    gla = {"heads": heads, "key_dim": keys, "value_dim": values, "chunk_size": chunk}
    config = tiny_config(layer_pattern="L", hidden_size=hidden, letters=LETTERS, mixers={"gla": gla})
    mixer = mixer_class("gla")(config, 0)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.02)
    mixer.bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    kept: dict[int, Tensor] = {}
    length = 256
    u_BSC = torch.randn(1, length, hidden, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t):
        mixer(u_BSC, MixerInputs())
    size = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    measured = size / 2 / length - hidden  # without the input, in units of 16 bits
    estimated = mixer_class("gla").activations(config, 1)
    assert estimated.expensive + estimated.cheap == pytest.approx(measured, rel=0.1)


def test_the_planner_knows_the_mixer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--gpus", "1", "--plugin", str(PLUGIN)]
    found = []
    for letters in ("{L: [gla]}", "{L: [attention]}"):
        values = [f"model.letters={letters}", "model.layer_pattern=" + "L" * layers_of_quickstart()]
        assert plan([*arguments, *values, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["configured"])
    assert found[0]["activations_gib"] > 1.5 * found[1]["activations_gib"]
    assert found[0]["compute_s"] > 0


def layers_of_quickstart() -> int:
    return load_config(ROOT / "configs" / "quickstart.yaml").model.num_layers


def test_sizes_are_checked() -> None:
    config = tiny_config(layer_pattern="GL", **SHAPE)
    assert list(tp_problems(tiny_config(layer_pattern="LL", **SHAPE), 8)) == ["mixers.gla.heads 4 do not divide by 8"]
    assert valid_tp(config, 4) == [1, 2]
    with pytest.raises(ValueError, match=r"mixer gla: decay_range is \[0.5, 1.0\]"):
        tiny_config(layer_pattern="GL", letters=LETTERS, mixers={"gla": {"decay_range": [0.5, 1.0]}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"letters": {"G": ["no_such"]}}, "unknown mixer 'no_such'.*known: .*mamba2.*--plugin"),
        ({"letters": {"F": ["gla"]}}, "'F' must be one character other than F, M, A"),
        ({"letters": {"GG": ["gla"]}}, "'GG' must be one character"),
        ({"letters": {"G": ["gla", "gla"]}}, "two different mixers, because its gate weighs the first by g"),
        ({"letters": {"G": ["gla", "mamba2", "attention"]}}, "a layer has one mixer or two"),
        ({"mixers": {"gla": {"headz": 2}}}, r"unknown key 'mixers\.gla\.headz'; did you mean 'heads'"),
        ({"mixers": {"gla": {"heads": 0}}}, r"mixers\.gla\.heads is 0: .*greater than or equal to 1"),
        ({"mixers": {"attention": {"heads": 2}}}, "mixer attention has no settings here"),
        ({"layer_pattern": "GX", "letters": {"G": ["gla"]}}, r"has \['X'\]; use the letters F, M, A and G"),
    ],
)
def test_mistakes_in_letters_and_settings_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**given)


def test_settings_left_out_are_recorded_with_their_defaults() -> None:
    config = tiny_config(letters=LETTERS, layer_pattern="GL", mixers={"gla": {"heads": 2}})
    values = config.model_dump(mode="json")
    assert values["mixers"]["gla"] == {**values["mixers"]["gla"], "heads": 2, "chunk_size": 16}
    assert ModelConfig.model_validate(values) == config
    assert tiny_config(letters=LETTERS).mixers is not None and tiny_config().mixers is None


def test_initial_values_weight_decay_and_precision() -> None:
    model = tiny_model(layer_pattern="GL", **SHAPE)
    decay = torch.sigmoid(model.layers[1].gla.decay.bias.detach())
    assert 0.99 - 1e-6 <= float(decay.min()) < float(decay.max()) <= 0.999 + 1e-6
    spared = {name for name, _ in model.named_parameters() if ".gla." in name and no_weight_decay(name, model.config)}
    assert spared == {f"layers.{i}.gla.{name}" for i in range(2) for name in ("decay.bias", "norm.weight")}
    model.bfloat16()
    assert model.layers[0].gla.decay.bias.dtype == torch.float32
    assert model(tokens(1, 5)).logits_BSV.dtype == torch.bfloat16


@torch.no_grad()
def test_the_gate_weighs_the_first_branch_by_g_and_the_second_by_the_rest() -> None:
    """The same weights in the other order, with the opposite gate, are the same layer."""
    first, second = (tiny_model(layer_pattern=letter, use_alignment=False, **SHAPE) for letter in "GB")
    second.load_state_dict(first.state_dict())
    second.layers[0].gate.up.weight.neg_()
    ids = tokens(1, 9)
    torch.testing.assert_close(first(ids).logits_BSV, second(ids).logits_BSV, atol=1e-5, rtol=1e-5)


# Limits that a mixer may leave as they are


class Plain(Mixer):
    """A mixer that defines nothing but its computation."""

    name = module_name = "plain"

    def forward(self, u_BSC: Tensor, inputs: MixerInputs, cache: object = None) -> Tensor:
        return u_BSC


def test_a_mixer_without_a_plan_is_refused_and_not_computed_wrongly() -> None:
    from fusiontree.models.mixers import MIXERS

    MIXERS.register(Plain.name, Plain)
    config = tiny_config(layer_pattern="P", letters={"P": ["plain"]})
    training = load_config(ROOT / "configs" / "quickstart.yaml").training
    with pytest.raises(UserError, match="mixer plain cannot be split"):
        check_layout(config, ParallelConfig(engine="fsdp2", tp=2), training, 2)
    with pytest.raises(UserError, match=r"mixer plain does not support context parallelism; set parallel\.cp to 1"):
        check_layout(config, ParallelConfig(engine="fsdp2", cp=2), training, 2)
    check_layout(config, ParallelConfig(engine="fsdp2"), training, 2)


# The guide


def test_the_code_of_the_guide_is_the_code_of_the_file() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    source = PLUGIN.read_text(encoding="utf-8")
    assert len(blocks) >= 7
    for block in blocks:
        assert block.strip("\n") in source, block
    steps = re.findall(r"# step \d: .*", source)
    assert len(steps) == 7


def test_the_commands_of_the_guide_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusiontree.cli import main

    (commands,) = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    planned = [line for line in commands.replace("\\\n", " ").splitlines() if line.startswith("fusiontree plan")]
    assert planned
    monkeypatch.chdir(ROOT)
    for line in planned:
        assert main(shlex.split(line)[1:]) == 0
