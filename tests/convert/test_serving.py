"""``transformers serve`` answers requests in OpenAI's format with an exported model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.convert.checkpoints import convert, training_run

pytestmark = pytest.mark.slow  # transformers and the server need half a minute to start

PACKAGES = ("transformers.cli.serve", "fastapi", "uvicorn", "openai", "accelerate")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
QUESTION = {"messages": [{"role": "user", "content": "a short text"}], "max_tokens": 8, "temperature": 0}
START = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


def missing() -> str:
    """Return the first package that serving lacks here, or an empty text."""
    for name in PACKAGES:
        try:
            if find_spec(name) is None:
                return name
        except ModuleNotFoundError:
            return name
    return ""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a server that has loaded an export, and the export's folder."""
    if lacking := missing():
        pytest.skip(f"{lacking} is not installed; pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("served")
    training_run(folder / "run", layer_pattern="FMA", num_layers=3, max_position_embeddings=256)
    convert(folder / "run", folder / "hf", "--to", "hf")
    (folder / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", START, "serve", str(folder / "hf"), *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 240
        while not answers(address):
            text = (folder / "log").read_text()[-3000:]
            assert process.poll() is None and time.monotonic() < deadline, f"the server did not start: {text}"
            time.sleep(0.5)
        yield address, folder / "hf"
    finally:
        process.kill()
        process.wait()
        log.close()


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def ask(address: str, path: str, **body: Any) -> str:
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=200).read().decode()


def test_a_chat_completion_is_what_generate_writes(server: tuple[str, Path], tmp_path: Path, monkeypatch: Any):
    import transformers

    address, folder = server
    answer = json.loads(ask(address, "chat/completions", model=str(folder), **QUESTION))
    text = answer["choices"][0]["message"]["content"]
    assert answer["object"] == "chat.completion" and answer["usage"]["completion_tokens"] == 8
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("a short text\n", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert text == tokenizer.decode(output, skip_special_tokens=True)


def test_a_streamed_answer_is_the_whole_one_in_pieces(server: tuple[str, Path]):
    address, folder = server
    whole = json.loads(ask(address, "chat/completions", model=str(folder), **QUESTION))
    lines = ask(address, "chat/completions", model=str(folder), stream=True, **QUESTION).splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert sum(map(bool, pieces)) > 1


def test_a_completion_needs_no_chat_template(server: tuple[str, Path]):
    address, folder = server
    answer = json.loads(ask(address, "completions", model=str(folder), prompt="a short", max_tokens=5, temperature=0))
    assert answer["choices"][0]["text"]
