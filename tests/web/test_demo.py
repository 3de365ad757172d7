"""The page in demo/, in headless Chromium: it computes what Python computes, stays within its origin, and is usable."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from demo_server import PAGE, DemoServer, serve
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tiny_models import byte_model, byte_tokenizer
from transformers import AutoConfig

from healthslm.export.export import export
from healthslm.export.onnx import OnnxRuntime
from healthslm.export.options import ExportOptions
from healthslm.hub.files import MODEL_OF_PAGE

PROMPT = "Vitamin D, β₂-microglobulin and"
SLOW = 240_000
"""Milliseconds in which a busy machine loads the page or generates a text."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX form of a tiny model, whose tokens are bytes.

    The page gets fp32 weights under the name of those in 8 bits, whose arithmetic differs between processors.
    """
    folder = tmp_path_factory.mktemp("model")
    original = byte_model(max_position_embeddings=1024)
    original.model.embed_tokens.weight.data[0] = 0  # the separator is never likely, so that texts don't end early
    original.save_pretrained(folder / "original")
    byte_tokenizer().save_pretrained(folder / "original")
    (folder / "original/README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    export(ExportOptions(str(folder / "original"), "onnx", folder / "onnx", base="someone/tiny"))
    (folder / "onnx/onnx/model.onnx").replace(folder / "onnx/onnx/model_quantized.onnx")
    return folder / "onnx"


@pytest.fixture
def server(model: Path) -> Iterator[DemoServer]:
    with serve(model) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield chromium
        chromium.close()


def open_page(browser: Browser, server: DemoServer, **options) -> Page:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(SLOW)
    page.goto(f"{server.origin}/index.html")
    return page


def wait_until_ready(page: Page) -> None:
    expect(page.get_by_role("button", name="Generate")).to_be_enabled(timeout=SLOW)


def generate(page: Page, prompt: str, temperature: float, top_k: int, length: int) -> None:
    """Fill in the form by its labels, and press Generate."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in (("Temperature", temperature), ("Top-k", top_k), ("Length", length)):
        page.get_by_label(label).fill(str(value))
    page.get_by_role("button", name="Generate").click()


def wait_until_done(page: Page) -> str:
    expect(page.locator("#status")).to_contain_text("tokens/s", timeout=SLOW)
    return page.locator("#status").inner_text()


def generated(page: Page) -> tuple[str, list[float]]:
    """The generated text, and the surprises in the tooltips."""
    spans = page.locator("#output span")
    text = "".join(spans.all_text_contents())
    return text, spans.evaluate_all("spans => spans.map(span => parseFloat(span.title))")


@pytest.fixture(scope="module")
def ready_page(browser: Browser, model: Path) -> Iterator[tuple[Page, list[str], list[str]]]:
    """A page with the model loaded, all that it requested, and what it wrote to the console."""
    requests: list[str] = []
    messages: list[str] = []
    with serve(model) as server:
        page = browser.new_context().new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(f"{server.origin}/index.html")
        wait_until_ready(page)
        yield page, requests, messages


def test_the_page_writes_the_greedy_text_of_python_with_the_surprise_of_its_tokens(ready_page, model):
    page, _, _ = ready_page
    tokenizer = byte_tokenizer()
    runtime = OnnxRuntime(model / "onnx/model_quantized.onnx", AutoConfig.from_pretrained(model), tokenizer)
    ids = tokenizer(PROMPT)["input_ids"]
    expected = runtime.greedy(ids, 40)
    log_probabilities = runtime.logits(ids + expected)[len(ids) - 1 : -1].double().log_softmax(-1)
    bits = -log_probabilities.gather(1, torch.tensor(expected)[:, None]).sum() / torch.tensor(2).log()

    generate(page, PROMPT, temperature=0, top_k=50, length=40)
    assert "40 tokens in" in wait_until_done(page)
    text, surprises = generated(page)
    assert text == tokenizer.decode(expected)
    assert page.locator("#output").inner_text().startswith(PROMPT)
    assert sum(surprises) == pytest.approx(bits.item(), rel=0.02)


def test_temperature_changes_the_text_but_not_how_surprise_is_measured(ready_page):
    page, _, _ = ready_page
    generate(page, PROMPT, temperature=0, top_k=0, length=20)
    wait_until_done(page)
    greedy = generated(page)
    generate(page, PROMPT, temperature=2, top_k=1, length=20)  # one token to choose from
    wait_until_done(page)
    assert generated(page) == greedy
    generate(page, PROMPT, temperature=2, top_k=0, length=20)
    wait_until_done(page)
    text, surprises = generated(page)
    assert text != greedy[0]
    assert sum(surprises) / len(surprises) > sum(greedy[1]) / len(greedy[1])


def test_text_appears_while_it_is_generated_and_stops(ready_page):
    page, _, _ = ready_page
    generate(page, PROMPT, temperature=0, top_k=50, length=900)
    page.locator("#output span").first.wait_for()
    assert page.locator("#output").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    status = wait_until_done(page)
    assert status.startswith("Stopped. ")
    assert 0 < int(re.search(r"(\d+) tokens in", status)[1]) < 900
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_a_prompt_longer_than_the_context_is_refused_in_words(ready_page):
    page, _, _ = ready_page
    generate(page, "long " * 300, temperature=0, top_k=50, length=5)
    expect(page.get_by_role("alert")).to_have_text(
        "The prompt has 1501 tokens and the model reads at most 1024. Shorten it.", timeout=SLOW
    )
    generate(page, PROMPT, temperature=0, top_k=50, length=5)  # the page still works
    wait_until_done(page)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_the_page_works_by_keyboard_with_visible_focus(ready_page):
    page, _, _ = ready_page
    focused = "() => [document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
    page.get_by_label("Length").fill("5")
    page.get_by_label("Prompt", exact=True).focus()
    visited = [page.evaluate(focused)]
    while visited[-1][0] != "output":
        page.keyboard.press("Tab")
        visited.append(page.evaluate(focused))
    assert {style for _, style in visited} == {"solid"}
    assert [name for name, _ in visited if name] == ["prompt", "temperature", "top-k", "length", "generate", "output"]

    page.get_by_role("button", name="BACKGROUND: Sepsis is").press("Enter")
    assert page.get_by_label("Prompt", exact=True).input_value() == "BACKGROUND: Sepsis is"
    page.get_by_label("Length").press("Enter")
    wait_until_done(page)
    text, surprises = generated(page)
    page.locator("#output").press("ArrowRight")
    expect(page.locator("#token")).to_contain_text(f"{surprises[0]:.2f} bits")
    page.locator("#output").press("ArrowRight")
    expect(page.locator("#token")).to_contain_text(f"{surprises[1]:.2f} bits")


def test_the_page_requests_its_own_files_only_and_has_no_errors(ready_page):
    page, requests, messages = ready_page
    origin = page.evaluate("location.origin")
    assert requests.count(f"{origin}/model/onnx/model_quantized.onnx") == 1
    of_model = {url.removeprefix(f"{origin}/model/") for url in requests if url.startswith(f"{origin}/model/")}
    assert of_model == set(MODEL_OF_PAGE)  # what is published
    assert [url for url in requests if not url.removeprefix("blob:").startswith((f"{origin}/", "data:"))] == []
    assert [message for message in messages if "Content Security Policy" in message] == []


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_the_screen(ready_page, width, scheme):
    """Labels, contrast and roles by axe-core."""
    page, _, _ = ready_page
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme)
    generate(page, PROMPT, temperature=2, top_k=0, length=40)
    wait_until_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page).response
    assert [(problem["id"], node["html"]) for problem in found["violations"] for node in problem["nodes"]] == []
    assert {"color-contrast", "label"} <= {rule["id"] for rule in found["passes"]}


def test_progress_is_shown_while_the_model_loads(browser, server):
    server.gate.clear()
    page = open_page(browser, server)
    expect(page.get_by_role("progressbar", name="Loading the model")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("Loading the model")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    server.gate.set()
    wait_until_ready(page)
    expect(page.get_by_role("progressbar")).to_have_count(0)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/model_quantized.onnx"])
def test_a_missing_file_of_the_model_is_named(browser, server, name):
    server.missing.add(f"/model/{name}")
    page = open_page(browser, server)
    expect(page.get_by_role("alert")).to_contain_text(f"model/{name} is missing", timeout=SLOW)
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()


def test_a_missing_file_of_the_page_is_reported(browser, server):
    server.missing.add("/vendor/transformers.min.js")
    page = open_page(browser, server)
    expect(page.get_by_role("alert")).to_contain_text("one of its files is missing", timeout=SLOW)


def test_a_browser_without_webassembly_is_told_so(browser, server):
    page = browser.new_context().new_page()
    page.add_init_script("delete globalThis.WebAssembly")  # as Chromium's --js-flags=--noexpose-wasm does
    page.goto(f"{server.origin}/index.html")
    expect(page.get_by_role("alert")).to_contain_text("has no WebAssembly", timeout=SLOW)


def worker_with(code: str) -> bytes:
    """The worker's file, with code to run first."""
    return code.encode() + b"\n" + (PAGE / "worker.js").read_bytes()


def test_too_little_memory_is_reported(browser, server):
    """With the error that Chromium raises."""
    server.changed["/worker.js"] = worker_with(
        "WebAssembly.Memory = class { constructor(size) { throw new RangeError("
        "'WebAssembly.Memory(): could not allocate memory'); } };"
    )
    page = open_page(browser, server)
    expect(page.get_by_role("alert")).to_contain_text("not enough memory", timeout=SLOW)


def test_the_policy_of_the_page_also_keeps_the_worker_from_other_origins(browser, server, model):
    with serve(model) as other:
        server.changed["/worker.js"] = worker_with(
            f"await fetch('{other.origin}/index.html', {{ mode: 'no-cors' }}).catch(() => undefined);"
        )
        page = open_page(browser, server)
        wait_until_ready(page)
        assert other.requests == []
