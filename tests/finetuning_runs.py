"""Short runs of fine-tuning, their data, and the losses that they are compared with."""

from pathlib import Path
from typing import Any

import torch
from row_files import write_lines

from healthslm.finetuning.examples import Example, read_examples
from healthslm.finetuning.options import FinetuneOptions

ROWS = [
    {"prompt": f"Item {number} is", "completion": f" {'even' if number % 2 == 0 else 'odd'}."} for number in range(8)
]
FAST = {"batch_size": 2, "epochs": 2.0, "learning_rate": 0.01, "evaluations": 2, "device": "cpu"}


def options(base: Path, output: Path, **more: Any) -> FinetuneOptions:
    size = {} if more.get("method") == "full" else {"rank": 4}
    return FinetuneOptions(**({"model": str(base), "output": output} | FAST | size | more))


def read(rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path, context: int = 64, **more: Any) -> list[Example]:
    asked = options(Path("none"), tmp_path, data=[str(write_lines(tmp_path / "rows.jsonl", rows))], **more)
    return read_examples(asked.data, asked, tokenizer, context, asked.examples).examples


def nats_by_hand(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The negative log-likelihood of each token of a completion."""
    ids = torch.tensor([prompt + completion])
    log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return -torch.stack([log_probs[place, ids[0, place + 1]] for place in places])
