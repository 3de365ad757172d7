"""A tiny model with a tokenizer that has merges, and its exports."""

import shutil
from functools import cache
from pathlib import Path

import torch
from paths import REPOSITORY
from tiny_models import byte_tokenizer, tiny_model
from transformers import PreTrainedTokenizerBase

from healthslm.export.check import PROMPTS
from healthslm.export.export import export
from healthslm.export.options import ExportOptions

TEXTS = [*PROMPTS, "", " ", "\r\n\t", "don't DON'T 'll", "naïve café Ⅷ½ 你好 🇩🇪", "a" * 50, "x<|endoftext|>y"]
CARD = "---\nlicense: mit\n---\n\n# Tiny\n"


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with some merges."""
    return byte_tokenizer().train_new_from_iterator([TEXTS] * 4, vocab_size=300, show_progress=False)


def write_model(folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A model with three layers and eight ids without a token."""
    model = tiny_model("healthslm", vocab_size=len(tokenizer()) + 8, num_hidden_layers=3, **options)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shutil.copy(REPOSITORY / "chat_template.jinja", folder)
    (folder / "README.md").write_text(CARD)
    return folder


def exported(source: Path, form: str, folder: Path, **options) -> Path:
    export(ExportOptions(str(source), form, folder, **options))
    return folder
