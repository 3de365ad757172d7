"""Peak memory of fine-tuning by method: all weights, LoRA, and LoRA on weights in 4 bits, for the same batch on a CPU.

    python benchmarks/finetuning.py --model . --context 1024

Each method runs in a process of its own: one step on `--micro-batch-size` sequences of `--context` tokens, with a loss
on every token. Memory is the peak of the process minus what it took after importing the libraries: the median of
`--runs`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = ("full", "lora", "qlora")


def peak_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def measure(method: str, arguments: argparse.Namespace) -> None:
    """Run one step and print the peak memory in MB."""
    import numpy as np

    from healthslm.finetuning import sft
    from healthslm.finetuning.options import FinetuneOptions
    from healthslm.tokenization.encoding import load_tokenizer

    if method == "qlora":
        import bitsandbytes  # noqa: F401
    tokenizer = load_tokenizer(arguments.model)
    tokens = np.random.default_rng(0).integers(300, len(tokenizer), size=2 * arguments.context)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.jsonl")
        text = tokenizer.decode(tokens)
        rows = [json.dumps({"text": text})] * arguments.micro_batch_size
        data.write_text("\n".join(rows), encoding="utf-8")
        before = peak_bytes()
        sft.finetune(
            FinetuneOptions(
                model=arguments.model,
                data=[str(data)],
                output=Path(folder, "run"),
                method=method,
                context=arguments.context,
                truncate=True,
                batch_size=arguments.micro_batch_size,
                micro_batch_size=arguments.micro_batch_size,
                device="cpu",
            )
        )
    print(f"peak {(peak_bytes() - before) / 1e6:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, help="measure one method in this process")
    arguments = parser.parse_args()
    if arguments.method:
        measure(arguments.method, arguments)
        return
    medians: dict[str, float] = {}
    for method in METHODS:
        command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
        peaks = []
        for _ in range(arguments.runs):
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks.append(float(printed.rpartition("peak ")[2]))
        medians[method] = statistics.median(peaks)
        share = medians[method] / medians["full"]
        print(
            f"{method:6} {medians[method]:5.0f} MB ({min(peaks):.0f} to {max(peaks):.0f}), {share:.2f} of full",
            flush=True,
        )


if __name__ == "__main__":
    main()
