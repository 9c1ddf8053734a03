"""Pipelines, `transformers serve` and `chat`, and the page of scripts/demo.py, on one micro checkpoint."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from threading import Thread

import pytest
import torch
from creatures import GPT2, load_script, micro_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer, TextStreamer

import modeling_creature
from creature.data.text.tokenizer import load_tokenizer
from creature.errors import UserError

PROJECT = Path(modeling_creature.__file__).parent
TEMPLATE = PROJECT / "configs" / "chat_template.jinja"
CHROMIUM = shutil.which("chromium")
CHAT = [{"role": "user", "content": "Who are you?"}]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A micro checkpoint with GPT-2's tokenizer and the chat template, and a picture where a run has its loss plot."""
    import matplotlib.pyplot as plt

    path = tmp_path_factory.mktemp("served") / "micro"
    tokenizer = load_tokenizer()
    model = micro_model(max_position_embeddings=128, action_mean=[0.0, 0.0], action_std=[1.0, 1.0], **GPT2)
    ids = {name: GPT2[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    words = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]{3,}", token)]
    with torch.no_grad():  # only words, which a console and a page show unchanged
        model.model.embed_tokens.weight.mul_(0.02).index_copy_(0, torch.tensor(words), torch.randn(len(words), 32) / 4)
    model.generation_config = GenerationConfig(**ids, do_sample=True, temperature=0.8, top_k=50)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    shutil.copy(TEMPLATE, path)
    plt.imsave(path / "loss.png", torch.zeros(20, 30, 3).numpy())
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def greedy(model, tokenizer, text: str, count: int) -> str:
    """The continuation alone."""
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_chat_template_marks_the_assistants_tokens(tokenizer):
    chat = [{"role": "system", "content": "Be brief. "}, *CHAT, {"role": "assistant", "content": " A creature.\n"}]
    whole = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    text = tokenizer.decode(whole["input_ids"])
    assert text == "Be brief.\nUser: Who are you?\nCreature: A creature.<|endoftext|>\n"
    ids = zip(whole["input_ids"], whole["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, own in ids if own]) == " A creature.<|endoftext|>"
    asked = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole["input_ids"][: len(asked)] == asked, "what is trained on begins with what is asked"
    with pytest.raises(Exception, match="knows the roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}])


def test_the_pipeline_continues_batches_and_chats(folder, model, tokenizer):
    from transformers import pipeline

    pipe = pipeline("text-generation", str(folder), device_map="auto")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    prompts = [PROMPT, "The old captain looked out at the sea and", "Why"]
    alone = [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert alone == [greedy(model, tokenizer, prompt, 6) for prompt in prompts]
    batched = [rows[0]["generated_text"] for rows in pipe(prompts, batch_size=3, **options)]
    assert batched == alone
    assert pipe(PROMPT, max_new_tokens=6)[0]["generated_text"].startswith(PROMPT)
    torch.manual_seed(0)
    several = pipe(PROMPT, num_return_sequences=4, max_new_tokens=6)  # samples, as generation_config.json says
    assert len({row["generated_text"] for row in several}) > 1
    answer = pipe(CHAT, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert answer[:-1] == CHAT and answer[-1]["role"] == "assistant"
    assert answer[-1]["content"] == greedy(model, tokenizer, "User: Who are you?\nCreature:", 6)


def test_streamers_get_the_same_text(folder, model, tokenizer, capsys):
    from transformers import pipeline

    expected = greedy(model, tokenizer, PROMPT, 12)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    pipe(PROMPT, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 12, "do_sample": False, "streamer": streamer}
    thread = Thread(target=pipe, args=(PROMPT,), kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 1


# ---------------------------------------------------------------------------------------------------------------------
# transformers serve and chat
# ---------------------------------------------------------------------------------------------------------------------


def environment(home: Path) -> dict:
    """For a process of the libraries alone; its hub is at a port where nobody is."""
    kept = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH" and "OFFLINE" not in name}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    # Not HF_HUB_OFFLINE: huggingface_hub takes it to forbid the loopback device, too, and `chat` asks through it.
    # The command line looks for a newer transformers otherwise.
    kept |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return kept | proxies | {"OMP_NUM_THREADS": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "transformers.cli.transformers", *words]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The address of `transformers serve` with the micro checkpoint, loaded with the code in its folder."""
    for name in ("fastapi", "uvicorn", "openai", "typer"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path_factory.mktemp("server")
    words = command("serve", str(folder), "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1")
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [*words, "--port", str(port)], cwd=place, env=environment(place), stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()[-4000:]
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def test_an_openai_client_is_answered(client, folder, model, tokenizer):
    expected = greedy(model, tokenizer, "User: Who are you?\nCreature:", 8)
    request = {"model": str(folder), "messages": CHAT, "max_tokens": 8}
    whole = client.chat.completions.create(**request, temperature=0)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content == expected
    prompt = len(tokenizer("User: Who are you?\nCreature:")["input_ids"])
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 8)
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**request, temperature=0, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 1
    texts = {
        client.chat.completions.create(**request, temperature=1.5, seed=seed).choices[0].message.content
        for seed in range(3)
    }
    assert len(texts) > 1, "the temperature of a request counts"
    text = client.completions.create(model=str(folder), prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
    assert text == greedy(model, tokenizer, PROMPT, 8)


def test_transformers_chat_talks_to_the_server(server, folder, model, tokenizer, tmp_path):
    pytest.importorskip("rich")
    flags = ["max_new_tokens=8", "do_sample=False"]
    done = subprocess.run(
        command("chat", str(folder), f"{server}/v1", *flags), cwd=tmp_path, env=environment(tmp_path),
        input="Who are you?\nn\n!exit\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    expected = greedy(model, tokenizer, "User: Who are you?\nCreature:", 8)
    assert expected.strip() in " ".join(done.stdout.split())
    assert "8 tokens in" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# scripts/demo.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return load_script("demo")


def test_the_page_streams_one_text_and_stops_when_it_is_closed(demo, model, tokenizer):
    texts = list(demo.continue_text(model, tokenizer, PROMPT, 0, 1.0, 12))
    assert texts[-1] == PROMPT + greedy(model, tokenizer, PROMPT, 12) and len(texts) > 2
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    left = demo.continue_text(model, tokenizer, PROMPT, 1.0, 0.9, 12)
    next(left)
    left.close()
    assert list(demo.continue_text(model, tokenizer, "", 0, 1.0, 3))
    with pytest.raises(UserError, match="fills the context"):
        next(demo.continue_text(model, tokenizer, "a " * 128, 1.0, 1.0, 5))

    def broken(*args, **kwargs):
        raise RuntimeError("no device")

    silent = modeling_creature.MultiModalCreature(model.config)
    silent.generate = broken
    with pytest.raises(RuntimeError, match="no device"):
        list(demo.continue_text(silent, tokenizer, PROMPT, 1.0, 1.0, 5))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_in_a_browser(demo, model, tokenizer, folder, tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    page = demo.build_page(model, tokenizer, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = demo.launch(page, "127.0.0.1", port)
    flags = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    asked = []
    try:
        with playwright.sync_playwright() as browsers:
            browser = browsers.chromium.launch_persistent_context(
                tmp_path / "profile", executable_path=CHROMIUM, args=flags.split(), headless=True
            )
            tab = browser.new_page()
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(address)
            tab.get_by_label("Prompt").fill("The sea")
            tab.get_by_label("number input for Temperature").fill("0")
            tab.get_by_label("number input for New tokens, at most").fill("40")
            # Every state that the text has been in, as a page shows it.
            tab.evaluate(
                """() => { const box = [...document.querySelectorAll('label')].find(
                    label => label.innerText.trim() === 'Text').querySelector('textarea');
                window.seen = []; setInterval(() => {
                    if (box.value && window.seen.at(-1) !== box.value) window.seen.push(box.value) }, 5) }"""
            )
            tab.get_by_role("button", name="Continue").click()
            expected = "The sea" + greedy(model, tokenizer, "The sea", 40)
            tab.wait_for_function("text => window.seen.at(-1) === text", arg=expected, timeout=60_000)
            seen = tab.evaluate("window.seen")
            width = tab.locator("#loss img").evaluate("image => image.naturalWidth")
            browser.close()
    finally:
        page.close()
    assert len(seen) > 1 and all(expected.startswith(text) for text in seen)
    assert width == 30, "the loss plot is shown"
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside, "the page loads nothing from elsewhere"
