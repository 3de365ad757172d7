"""Options of `export`. They import nothing heavy, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from healthslm.options import CheckedOptions, OptionError, Range

Format = Literal["llama", "gguf", "onnx"]


@dataclass
class ExportOptions(CheckedOptions):
    """Options of `export`."""

    model: str
    """Folder or Hub name of a HealthSLM or Llama model that is not quantized, with its tokenizer."""
    format: Format
    """`llama` for Transformers without remote code, vLLM and SGLang, `gguf` for llama.cpp and Ollama, `onnx` for
    transformers.js and ONNX Runtime."""
    output: Path
    """Folder to write. An earlier export in it is replaced once the new one is checked."""
    base: str | None = None
    """Name of the exported model in the model card, such as its name on the Hub. By default `--model`."""
    data: list[str] = field(default_factory=list)
    """Also compute the bits per byte of the model and of each exported form on these Parquet or JSON Lines files with
    columns `title` and `text`, or folders or glob patterns of such files."""
    documents: Annotated[int | None, Range(at_least=1)] = None
    """Number of documents to evaluate on, from the first one. By default all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.documents is not None and not self.data:
            raise OptionError("documents", "needs --data")
