"""Peak memory of fine-tuning by method: all weights, LoRA, and LoRA on weights in 4 bits, for the same batch on a CPU.

    python benchmarks/finetuning.py --model . --context 1024

Each method runs in a process of its own: one step on `--micro-batch-size` sequences of `--context` tokens, with a loss
on every token. Memory is the peak of the process minus what it took before, all libraries being imported, and
without pages of files: the median of `--runs`. Linux only.
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

METHODS = ("full", "lora", "qlora")


def anonymous_bytes() -> int:
    """Memory of this process without the pages of files, such as those of libraries, which come and go."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@contextmanager
def watching_memory() -> Iterator[list[int]]:
    """Yield a list whose only number is the peak of the block so far, from a sample every millisecond."""
    peak, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def train_one_step(method: str, model: str, context: int, sequences: int) -> None:
    import numpy as np

    from healthslm.finetuning import sft
    from healthslm.finetuning.options import FinetuneOptions
    from healthslm.tokenization.encoding import load_tokenizer

    tokenizer = load_tokenizer(model)
    text = tokenizer.decode(np.random.default_rng(0).integers(300, len(tokenizer), size=2 * context))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        data.write_text("\n".join([json.dumps({"text": text})] * sequences), encoding="utf-8")
        options = FinetuneOptions(
            model=model,
            data=[str(data)],
            output=Path(folder, "run"),
            method=method,
            context=context,
            truncate=True,
            batch_size=sequences,
            micro_batch_size=sequences,
            device="cpu",
        )
        sft.finetune(options)


def measure(method: str, model: str, context: int, sequences: int) -> None:
    """Run one step and print the peak memory in MB."""
    train_one_step(method, model, 8, 1)  # imports what the libraries import late
    gc.collect()
    before = anonymous_bytes()
    with watching_memory() as peak:
        train_one_step(method, model, context, sequences)
    print(f"peak {(peak[0] - before) / 1e6:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--method", choices=METHODS, help="measure one method in this process")
    arguments = parser.parse_args()
    if arguments.method:
        measure(arguments.method, arguments.model, arguments.context, arguments.micro_batch_size)
        return
    # glibc then returns the memory of every tensor at once instead of keeping some of it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    medians: dict[str, float] = {}
    for method in METHODS:
        command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
        peaks = []
        for _ in range(arguments.runs):
            printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            peaks.append(float(printed.rpartition("peak ")[2]))
        medians[method] = statistics.median(peaks)
        share = medians[method] / medians["full"]
        print(
            f"{method:6} {medians[method]:5.0f} MB ({min(peaks):.0f} to {max(peaks):.0f}), {share:.2f} of full",
            flush=True,
        )


if __name__ == "__main__":
    main()
