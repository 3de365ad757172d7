"""Compare the speed and memory of programs that generate text with the same weights:

    python scripts/export.py --model . --format llama --output exports/llama
    python scripts/export.py --model . --format gguf --output exports/gguf
    python scripts/export.py --model . --format onnx --output exports/onnx
    python benchmarks/inference.py --exports exports

All run on the CPU, with the same prompts, and decode greedily to a fixed number of tokens:

    HealthSLM         Transformers' `generate` with this repository's model, in fp32
    static, compiled  the same with a static cache and torch.compile, which needs a C++ compiler
    Llama             Transformers' `generate` with the Llama form, in fp32
    llama.cpp         its server, with the GGUF form in F16 and Q8_0
    ONNX Runtime      a plain loop over the ONNX form in fp32 and 8 bits, with its cache
    browser           the page in demo/ in headless Chromium, 8 bits; needs `make demo/vendor`

Each runs in its own process, all of them in every round, after a warm-up on the same prompts. The columns of the table:

    tokens/s            200 tokens after a prompt of 16: median over the rounds with the slowest and the fastest
    to Llama's          the median over the rounds of the ratio to Llama in the same round
    first token         milliseconds from a prompt of 512 tokens to the token after it
    batch               tokens/s of 8 such prompts at the same time, 200 tokens each
    memory              peak of a single text, above imports, with the weights
    warm-up             seconds of the first call, with compilation
    same tokens         share of the 200 tokens before the first one that HealthSLM would not generate
"""

import json
import os
import shutil
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from healthslm.cli import run
from healthslm.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = "Patients with type 2 diabetes were randomly assigned to metformin or placebo for 24 weeks. "
PROMPT, LONG_PROMPT, NEW, BATCH = 16, 512, 200, 8


@dataclass
class BenchmarkOptions:
    """Options of `benchmark`."""

    exports: Path
    """Folder with the exports `llama`, `gguf` and `onnx`."""
    model: str = "."
    """Folder of the model that they were exported from."""
    rounds: int = 3
    threads: int = len(os.sched_getaffinity(0))
    """Threads of each program except the browser, which has one."""
    only: list[str] = field(default_factory=list)
    """Names of contenders to run. By default all."""


@dataclass
class Measurement:
    tokens_per_second: float
    first_token_seconds: float
    batch_tokens_per_second: float | None
    memory: int | None
    """Bytes."""
    warm_up_seconds: float
    tokens: list[int]


class Contender(ABC):
    """A program with the model loaded."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Continue prompts of the same length; the same number of new tokens for each."""


class TransformersContender(Contender):
    def __init__(self, model: str, options: BenchmarkOptions, **settings: object):
        import torch
        from transformers import AutoModelForCausalLM

        from healthslm.generation import GREEDY

        torch.set_num_threads(options.threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None  # so that it never ends early
        self.settings = {**GREEDY, "pad_token_id": 0, **settings}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        written = self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **self.settings)
        return written[:, ids.shape[1] :].tolist()


def compiled(options: BenchmarkOptions) -> Contender:
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True  # otherwise Transformers compiles on accelerators only
    return TransformersContender(options.model, options, cache_implementation="static", compile_config=config)


class LlamaCppContender(Contender):
    def __init__(self, precision: str, options: BenchmarkOptions):
        import xllamacpp

        (path,) = (options.exports / "gguf").glob(f"*-{precision}.gguf")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = BATCH * 1024
        settings.n_parallel = BATCH
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = options.threads
        settings.verbosity = -1
        self.server = xllamacpp.Server(settings)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(partial(self.complete, new_tokens), prompts))

    def complete(self, new_tokens: int, prompt: list[int]) -> list[int]:
        request = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        headers = {"Content-Type": "application/json"}
        address = self.server.listening_address + "/completion"
        with urlopen(Request(address, json.dumps(request).encode(), headers)) as answer:
            return json.load(answer)["tokens"]


class OnnxContender(Contender):
    def __init__(self, file: str, options: BenchmarkOptions):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        path = options.exports / "onnx/onnx" / file
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        _, heads, _, head_dim = self.session.get_inputs()[3].shape
        self.state_shape = (heads, 0, head_dim)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        import numpy as np

        names = [one.name for one in self.session.get_inputs()]
        ids, written = np.array(prompts), list[np.ndarray]()
        states = [np.zeros((len(prompts), *self.state_shape), np.float32)] * (len(names) - 3)
        past = 0
        while len(written) < new_tokens:
            total = past + ids.shape[1]
            mask = np.ones((len(ids), total), np.int64)
            positions = np.arange(past, total)[None].repeat(len(ids), 0)
            logits, *states = self.session.run(None, dict(zip(names, [ids, mask, positions, *states], strict=True)))
            ids, past = logits[:, -1].argmax(-1)[:, None], total
            written.append(ids)
        return np.concatenate(written, 1).tolist()


CONTENDERS: dict[str, Callable[[BenchmarkOptions], Contender]] = {
    "HealthSLM": lambda options: TransformersContender(options.model, options),
    "static, compiled": compiled,
    "Llama": lambda options: TransformersContender(str(options.exports / "llama"), options),
    "llama.cpp, F16": partial(LlamaCppContender, "F16"),
    "llama.cpp, Q8_0": partial(LlamaCppContender, "Q8_0"),
    "ONNX Runtime, fp32": partial(OnnxContender, "model.onnx"),
    "ONNX Runtime, 8 bits": partial(OnnxContender, "model_quantized.onnx"),
}
BROWSER = "browser, 8 bits"


def resident_bytes(key: str) -> int:
    """`VmRSS` for the resident memory of this process now, `VmHWM` for its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


def timed(function: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def measure(name: str, options: BenchmarkOptions, prompt: list[int], long_prompt: list[int]) -> Measurement:
    """Measure a contender in this process."""
    import onnxruntime  # noqa: F401 - before memory is read
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import xllamacpp  # noqa: F401

    before = resident_bytes("VmRSS")
    contender = CONTENDERS[name](options)
    warm_up, _ = timed(lambda: contender.generate([prompt], NEW))
    seconds, (tokens,) = timed(lambda: contender.generate([prompt], NEW))
    contender.generate([long_prompt], 1)
    first, _ = timed(lambda: contender.generate([long_prompt], 1))
    memory = resident_bytes("VmHWM") - before
    contender.generate([prompt] * BATCH, NEW)
    batch, _ = timed(lambda: contender.generate([prompt] * BATCH, NEW))
    return Measurement(NEW / seconds, first, BATCH * NEW / batch, memory, warm_up, tokens)


def measure_browser(options: BenchmarkOptions, prompt: list[int], long_prompt: list[int]) -> Measurement:
    """Measure the page in demo/, by the number of tokens and the time that it shows."""
    from playwright.sync_api import Page, sync_playwright

    from healthslm.tokenization.encoding import load_tokenizer

    sys.path.append(str(REPOSITORY / "tests/web"))
    from demo_server import serve

    tokenizer = load_tokenizer(options.model)

    def seconds_of(page: Page, ids: list[int], length: int) -> float:
        page.locator("#prompt").fill(tokenizer.decode(ids))
        page.locator("#temperature").fill("0")
        page.locator("#length").fill(str(length))
        page.evaluate("() => { window.done = new Promise((resolve) => { window.resolveDone = resolve; }); }")
        page.locator("#generate").click()
        return page.evaluate("window.done")

    with serve(options.exports / "onnx") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.add_init_script(
            "const Original = Worker; window.Worker = class extends Original { constructor(...given) { super(...given);"
            "this.addEventListener('message', ({ data }) => {"
            "if (data.type === 'done') window.resolveDone(data.seconds / data.tokens); }); } };"
        )
        page.goto(f"{server.origin}/index.html")
        page.locator("#generate:enabled").wait_for()
        warm_up = NEW * seconds_of(page, prompt, NEW)
        per_token = seconds_of(page, prompt, NEW)
        seconds_of(page, long_prompt, 1)
        first = seconds_of(page, long_prompt, 1)
    return Measurement(1 / per_token, first, None, None, warm_up, [])


def alone(function: Callable[..., Measurement], *arguments: object) -> Measurement:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def benchmark(options: BenchmarkOptions) -> None:
    """Measure all contenders and print the table.

    Raises:
        UserError: An export is missing, or there is no contender of a given name.
    """
    from healthslm.tokenization.encoding import encode_texts, load_tokenizer, separator_id

    everyone = [*CONTENDERS, BROWSER]
    if unknown := set(options.only) - set(everyone):
        raise UserError(f"no contender is named {'; '.join(unknown)}. There are: {'; '.join(everyone)}")
    names = [name for name in everyone if not options.only or name in options.only]
    for form in ("llama", "gguf", "onnx"):
        if not (options.exports / form).is_dir():
            raise UserError(f"{options.exports / form} is missing: make it with scripts/export.py --format {form}")
    tokenizer = load_tokenizer(options.model)
    ids = [separator_id(tokenizer), *encode_texts(tokenizer, [TEXT * 40])[0]]
    prompts = ids[:PROMPT], ids[:LONG_PROMPT]
    rounds: dict[str, list[Measurement]] = {name: [] for name in names}
    with tqdm(total=options.rounds * len(names)) as bar:
        for _ in range(options.rounds):
            for name in names:
                bar.set_postfix_str(name)
                function = measure_browser if name == BROWSER else partial(measure, name)
                rounds[name].append(alone(function, options, *prompts))
                bar.update()
    print(f"{options.threads} threads\n\n{table(rounds)}")


def table(rounds: dict[str, list[Measurement]]) -> str:
    lines = [
        "| | tokens/s | slowest to fastest round | to Llama's | first token, ms | batch, tokens/s | memory, MB | "
        "warm-up, s | same tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, measured in rounds.items():
        speeds = [one.tokens_per_second for one in measured]
        peers = [one.tokens_per_second for one in rounds.get("Llama", [])]
        ratios = [speed / peer for speed, peer in zip(speeds, peers, strict=bool(peers))]
        batches = [one.batch_tokens_per_second for one in measured if one.batch_tokens_per_second]
        memory = [one.memory for one in measured if one.memory]
        lines.append(
            f"| {name} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} | "
            f"{f'{statistics.median(ratios):.2f}' if ratios else '-'} | "
            f"{1000 * statistics.median(one.first_token_seconds for one in measured):,.0f} | "
            f"{f'{statistics.median(batches):,.0f}' if batches else '-'} | "
            f"{f'{max(memory) / 1e6:,.0f}' if memory else '-'} | "
            f"{max(one.warm_up_seconds for one in measured):.1f} | "
            f"{same_share(measured[0].tokens, rounds.get('HealthSLM', measured)[0].tokens)} |"
        )
    return "\n".join(lines)


def same_share(tokens: Sequence[int], expected: Sequence[int]) -> str:
    if not tokens:
        return "-"
    same = next((place for place, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) == 2), NEW)
    return f"{same / NEW:.0%}"


if __name__ == "__main__":
    run(benchmark, BenchmarkOptions, summary=__doc__)
