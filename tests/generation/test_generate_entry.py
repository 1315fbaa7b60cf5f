"""``python -m fusiontree.generate`` as a person calls it, on a checkpoint of a tiny byte model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch

from fusiontree.data.tokenizers import ByteTokenizer, save_tokenizer
from fusiontree.generate import main
from fusiontree.generation.decoding import generate
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.utils.device import choose_device, choose_dtype
from fusiontree.utils.errors import UserError
from tests.helpers import save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def model():
    # 257 bytes and end of document, rounded up; a text ends where the model was not trained to go on
    return tiny_model(vocab_size=264, layer_pattern="FMA", max_position_embeddings=96)


@pytest.fixture(scope="module")
def run_folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    files = save_tokenizer(ByteTokenizer.info, folder, folder)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    values = {"config": {"model": model.config.model_dump(mode="json", by_alias=True)}}
    save_checkpoint(folder / "checkpoints", 3, {n: t * 0 for n, t in tensors.items()}, values, files)
    save_checkpoint(folder / "checkpoints", 20, tensors, values, files)
    return folder


@pytest.fixture
def call(run_folder, capsys):
    def run(*arguments: str, checkpoint: Path = run_folder) -> tuple[int, str, str]:
        device = [] if "--device" in arguments else ["--device", "cpu"]
        code = main(["--checkpoint", str(checkpoint), *device, *arguments])
        return code, *capsys.readouterr()

    return run


def test_it_prints_the_text_of_the_newest_checkpoint_and_its_rate(call, model):
    code, out, err = call("--prompt", "ab", "--max-new-tokens", "20", "--greedy")
    expected = generate(
        model,
        [list(b"ab")],
        max_new_tokens=20,
        sampling=SamplingConfig(greedy=True),
        stop_tokens=[256],
        decode=ByteTokenizer().decode,
        never=range(257, 264),
    )
    assert code == 0
    assert out == f"ab{expected.rows[0].text}\n"
    assert "step-00000020" in err
    assert "2 prompt tokens" in err
    assert "new tokens" in err
    assert "tokens/s" in err


def test_json_lines_hold_what_was_drawn_and_the_seed_that_draws_it_again(call):
    options = ["--max-new-tokens", "9", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01"]
    options += ["--repetition-penalty", "1.1", "--json"]
    code, out, _ = call("--prompt", "first one", "--prompt", "2", "--seed", "5", *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["prompt"] for row in rows] == ["first one", "2"]
    assert [row["seed"] for row in rows] == [5, 6]
    for row in rows:
        assert len(row["tokens"]) == len(row["logprobs"]) <= 9
        assert row["text"] == ByteTokenizer().decode(row["tokens"])
        assert row["finish_reason"] in ("length", "stop_token")
        assert row["prompt_tokens"] == len(row["prompt"])
    alone = json.loads(call("--prompt", "2", "--seed", "6", *options)[1])
    assert alone["tokens"] == rows[1]["tokens"]


def test_ids_that_pad_the_vocabulary_are_never_drawn(call):
    prompts = ("--prompt", "b", "--prompt", "c", "--max-new-tokens", "60", "--json")
    rows = [json.loads(line) for line in call(*prompts, "--temperature", "50")[1].splitlines()]
    drawn = [token for row in rows for token in row["tokens"]]
    assert max(drawn) <= 256 and len(set(drawn)) > 40


def test_batches_do_not_change_the_text(call):
    prompts = [part for text in ("a", "bc", "def", "ghij", "k") for part in ("--prompt", text)]
    outputs = [call(*prompts, "--max-new-tokens", "8", "--batch-size", size)[1] for size in ("1", "2", "8")]
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].startswith("--- prompt 0, seed 0\na")


def test_streaming_prints_the_same_text(call):
    prompts = ["--prompt", "xy", "--prompt", "z", "--max-new-tokens", "12", "--stop", "q"]
    assert call(*prompts, "--stream")[1] == call(*prompts)[1]


def test_interactive_prompts_stream_until_an_empty_line(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"first\nsecond one\n" + b"x" * 200 + b"\nab\n\nnever\n")))
    code, out, err = call("--interactive", "--max-new-tokens", "9")
    wanted = [call("--prompt", text, "--seed", seed, "--max-new-tokens", "9")[1] for text, seed in
              (("first", "0"), ("second one", "1"), ("ab", "3"))]  # fmt: skip
    assert code == 0 and out == "".join([*wanted[:2], "x" * 200 + "\n", wanted[2]])
    assert "prompt 0 has 200 tokens" in err and "never" not in out
    assert call("--interactive", "--prompt", "a")[0] == 2


def test_prompts_in_chunks_give_the_same_text(call):
    options = ["--prompt", "a longer prompt", "--prompt", "b", "--max-new-tokens", "9"]
    assert call(*options, "--prefill-chunk", "4")[1] == call(*options)[1]
    assert call(*options, "--prefill-chunk", "0")[0] == 2


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_weights_in_8_bits_generate(call, weights):
    code, out, err = call("--prompt", "ab", "--max-new-tokens", "5", "--weights", weights)
    assert code == 0 and out.startswith("ab") and f"weights {weights}" in err


def test_a_stop_text_ends_the_text_before_it(call):
    free = json.loads(call("--prompt", "ab", "--max-new-tokens", "40", "--json")[1])["text"]
    stop = next(c for c in free[3:] if c.isprintable() and c != "\ufffd")
    stopped = json.loads(call("--prompt", "ab", "--max-new-tokens", "40", "--json", "--stop", stop)[1])
    assert stopped["text"] == free[: free.index(stop)]
    assert stopped["finish_reason"] == "stop_string"


def test_prompts_come_from_files_and_standard_input(call, tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_bytes(b"two\r\nlines\r")
    lines = '{"prompt": "α"}\n\n{"prompt": "b\u2028\x85\u2029c", "other": 1}\r\n'
    (tmp_path / "many.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"typed\r\n"), newline=None))
    files = [str(tmp_path / "long.txt"), str(tmp_path / "many.jsonl"), "-"]
    options = [part for file in files for part in ("--prompt-file", file)]
    out = call("--prompt", "0", *options, "--max-new-tokens", "2", "--json")[1]
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == [
        *("0", "two\r\nlines\r", "α", "b\u2028\x85\u2029c", "typed\r\n")
    ]


def test_without_a_number_the_text_ends_where_the_model_does(call):
    row = json.loads(call("--prompt", "a" * 90, "--stop", "\0never\0", "--json", "--seed", "1")[1])
    assert len(row["tokens"]) == 6 or row["finish_reason"] == "stop_token"
    code, _, err = call("--prompt", "a" * 96)
    assert code == 2
    assert "at most 0" in err
    assert call("--prompt", "a" * 96, "--allow-longer", "--max-new-tokens", "3")[0] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_generates(call, dtype):
    code, out, err = call("--prompt", "ab", "--max-new-tokens", "4", "--dtype", dtype)
    assert code == 0
    assert out.startswith("ab")
    assert dtype in err


def test_a_step_folder_is_a_checkpoint_too(call, run_folder):
    code, _, err = call("--prompt", "a", "--max-new-tokens", "1", checkpoint=run_folder / "checkpoints/step-00000003")
    assert code == 0
    assert "step-00000003" in err


def flipped(run_folder: Path, tmp_path: Path, name: str) -> Path:
    damaged = tmp_path / "damaged"
    shutil.copytree(run_folder, damaged)
    file = sorted((damaged / "checkpoints/step-00000020").glob(name))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return damaged


@pytest.mark.parametrize("name", ["*.distcp", "state.json", "tokenizer_info.json"])
def test_a_damaged_checkpoint_is_refused(call, run_folder, tmp_path, name):
    code, out, err = call("--prompt", "a", checkpoint=flipped(run_folder, tmp_path, name))
    assert (code, out) == (2, "")
    assert "SHA-256" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to continue.*--prompt"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "a", "--temperature", "0"], "temperature is 0.0"),
        (["--prompt", "a", "--greedy", "--top-k", "3"], "greedy.*top_k"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--max-new-tokens", "96"], "max_position_embeddings 96"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--device", "gpu"], "device 'gpu' is unknown.*cuda"),
        (["--prompt", "a", "--device", "mps"], "device 'mps' is not supported"),
        (["--prompt-file", "no/such/file.txt"], "prompt file 'no/such/file.txt' does not exist"),
        (["--prompt-file", str(Path(__file__).with_name("test_generate_entri.py"))], "did you mean"),
    ],
)
def test_what_the_user_got_wrong_is_one_error_with_exit_code_2(call, arguments, message):
    code, out, err = call(*arguments)
    errors = [line for line in err.splitlines() if not line.startswith("/")]  # without the line on the loaded model
    assert (code, out) == (2, "")
    assert len(errors) == 1
    assert re.search(f"^error: .*{message}", errors[0])


def test_a_mistyped_checkpoint_names_the_nearest(call, run_folder):
    code, out, err = call("--prompt", "a", checkpoint=run_folder.with_name("smal"))
    assert (code, out) == (2, "")
    assert "smal' does not exist; did you mean 'small'?" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(call):
    code, _, err = call("--prompt", "a", "--device", "cuda:0")
    assert code == 2
    assert "device is cuda:0, but" in err
    assert "use --device cpu" in err


@pytest.mark.parametrize("arguments", [["--promt", "a"], ["--max-new", "3"], ["--json", "--stream"], ["positional"]])
def test_unknown_and_contradicting_options_fail(call, arguments):
    with pytest.raises(SystemExit) as ended:
        call("--prompt", "a", *arguments)
    assert ended.value.code == 2


def test_a_bad_json_line_names_itself(call, tmp_path):
    for line in ("{", '{"text": "x"}', '["x"]', '{"prompt": 3}'):
        (tmp_path / "p.jsonl").write_text('{"prompt": "ok"}\n' + line)
        code, _, err = call("--prompt-file", str(tmp_path / "p.jsonl"))
        assert code == 2
        assert "p.jsonl, line 2" in err


def test_broken_weights_end_with_code_1(run_folder, model, tmp_path, capsys):
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors["model.head.weight"] = tensors["model.head.weight"] * float("nan")
    values = {"config": {"model": model.config.model_dump(mode="json", by_alias=True)}}
    save_checkpoint(tmp_path / "checkpoints", 1, tensors, values, [run_folder / "tokenizer_info.json"])
    assert main(["--checkpoint", str(tmp_path), "--prompt", "a", "--device", "cpu"]) == 1
    assert "not finite" in capsys.readouterr().err


def test_a_process_takes_the_gpu_of_its_number_and_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert choose_device("cuda:0", local_rank=1) == torch.device("cuda", 0)
    assert choose_device("cpu", local_rank=5) == torch.device("cpu")
    with pytest.raises(UserError, match=r"cuda:2 is absent: this machine shows 2 GPUs; start at most 2 processes"):
        choose_device("cuda", local_rank=2)
    with pytest.raises(UserError, match=r"device is cuda:7, but .* use cuda:0 to cuda:1"):
        choose_device("cuda:7")
    assert choose_dtype("auto", torch.device("cuda", 1)) is torch.bfloat16
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        choose_dtype("int8", torch.device("cpu"))
