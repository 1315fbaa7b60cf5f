"""What users do with an export: fine-tuning by transformers' Trainer and by peft, and text generation pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.checkpoints import convert, training_run

TEXTS = ["a short text", "another text, which is longer", "b"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    training_run(folder / "run", layer_pattern="FMA", num_layers=3)
    convert(folder / "run", folder / "hf", "--to", "hf")
    return folder / "hf"


@pytest.fixture
def loaded(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The model and the tokenizer, as a user loads them."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    return model, transformers.AutoTokenizer.from_pretrained(exported)


def three_steps(model: Any, tokenizer: Any, folder: Path, **options: Any) -> list[float]:
    """Train by transformers' Trainer on texts padded on the right; return the losses."""
    pytest.importorskip("accelerate")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer.padding_side = "right"
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    rows = [tokenizer(text) for text in TEXTS] * 3
    trainer = Trainer(model, arguments, DataCollatorForLanguageModeling(tokenizer, mlm=False), train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_it(checkpointing: bool, loaded: Any, tmp_path: Path):
    losses = three_steps(*loaded, tmp_path / "out", gradient_checkpointing=checkpointing)
    assert len(losses) == 3 and losses[2] < losses[0]


def test_peft_trains_low_rank_adapters(loaded: Any, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model, tokenizer = loaded
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses = three_steps(adapted, tokenizer, tmp_path / "out")
    assert losses[2] < losses[0]
    after = {name.replace(".base_layer", ""): value for name, value in model.named_parameters() if "lora" not in name}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    adapted.save_pretrained(tmp_path / "adapter")
    assert "layers.0.mamba.in_proj" in " ".join(name for name, _ in adapted.named_parameters() if "lora_A" in name)


def test_a_pipeline_goes_on_alike_with_pads_on_either_side(loaded: Any):
    from transformers import pipeline

    model, tokenizer = loaded
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    alone = [write(text, **options)[0]["generated_text"] for text in TEXTS]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        together = [rows[0]["generated_text"] for rows in write(TEXTS, batch_size=3, **options)]
        assert together == alone
    tokenizer.padding_side = "left"
    static = [
        rows[0]["generated_text"] for rows in write(TEXTS, batch_size=3, cache_implementation="static", **options)
    ]
    assert static == alone
    drawn = write(TEXTS * 4, max_new_tokens=40, do_sample=True, temperature=50.0, return_tensors=True)
    tokens = [token for rows in drawn for token in rows[0]["generated_token_ids"]]
    assert max(tokens) <= 256 and len(set(tokens)) > 100  # no id that only pads the vocabulary


def test_a_static_cache_allocates_once_and_gives_the_same_logits(loaded: Any):
    model, tokenizer = loaded
    tokenizer.padding_side = "right"
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain, static = (model.generate(**batch, **options, **extra) for extra in ({}, {"cache_implementation": "static"}))
    for got, want in zip(static.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, want)
    cache = static.past_key_values
    columns = batch["input_ids"].shape[1] + 6
    kept = [layer["global_k"] for layer in cache.layers if "global_k" in layer]
    assert kept and all(columns - 1 <= keys.shape[1] <= columns for keys in kept) and cache.capacity == kept[0].shape[1]
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    one = model.generate(**batch, **beams)
    assert torch.equal(one, model.generate(**batch, **beams, cache_implementation="static"))


def test_accelerate_wraps_it_and_its_step_changes_the_weights(loaded: Any):
    accelerate = pytest.importorskip("accelerate")
    model, tokenizer = loaded
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    batch = tokenizer(TEXTS[:1] * 2, return_tensors="pt")
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
