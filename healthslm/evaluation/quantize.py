"""Compare a model's precisions, or save it in one of them."""

import logging
import os
from pathlib import Path
from typing import Any

from healthslm.corpus.sources import read_source_texts
from healthslm.errors import UserError
from healthslm.evaluation.options import QuantizationOptions
from healthslm.evaluation.precisions import compare_precisions
from healthslm.files import write_json
from healthslm.models import find_device, open_model, refuse_adapter
from healthslm.quantization import available_precisions, check_precision, save_in_precision
from healthslm.tokenization.encoding import encode_documents, load_tokenizer

logger = logging.getLogger(__name__)


def quantize(options: QuantizationOptions) -> None:
    """Save a model in a precision, if `save` is given, and compare precisions on documents, if `data` is given.

    Raises:
        ModuleNotFoundError: The library for a precision is not installed.
        UserError: There is no such model, tokenizer or device, the model can't be quantized, there are no documents, or
            an output can't be written.
    """
    refuse_adapter(options.model)
    device = find_device(options.device)
    tokenizer, model = load_tokenizer(options.model), open_model(options.model)
    precisions = options.precisions or available_precisions()
    for precision in precisions:
        check_precision(model, precision)
    texts = read_source_texts(options.data, options.documents) if options.data else []
    if options.output is not None:
        _check_writable(options.output)

    if options.save is not None:
        save_in_precision(options.model, precisions[0], options.save, device)
        size = sum(file.stat().st_size for file in options.save.glob("*.safetensors"))
        logger.info("%s: %s, %.1f MB", options.save, precisions[0], size / 1e6)
    if texts:
        result = compare_precisions(
            options.model,
            precisions,
            encode_documents(tokenizer, texts),
            [len(text.encode()) for text in texts],
            device,
            progress=True,
        )
        if options.output is not None:
            write_json(options.output, {"model": options.model, "data": options.data, **result})
        print(format_comparison(result))


def _check_writable(path: Path) -> None:
    """Check before hours of work that a file can be written.

    Raises:
        UserError: It is a folder, or its folder is read-only.
        OSError: Its folder can't be created; names it.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, but the comparison is a JSON file; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: can't be written, because its folder is read-only; choose another path")


def format_comparison(result: dict[str, Any]) -> str:
    """Format the result of `compare_precisions` as a table."""
    speed = result["precisions"]["fp32"]["tokens_per_second"]
    columns = f"{'':6}{'file, MB':>10}{'memory, MB':>12}{'bits per byte':>29}{'difference to fp32':>31}"
    lines = [
        f"{result['documents']:,} documents, {result['bytes']:,} bytes; generate on {result['machine']}",
        f"{columns}{'tokens/s':>10}{'ratio':>7}",
    ]
    for name, found in result["precisions"].items():
        more = found["difference"]
        lines.append(
            f"{name:6}{found['file_bytes'] / 1e6:10.1f}{found['memory_bytes'] / 1e6:12.1f}"
            f"{_with_interval(found['bits_per_byte'], found['interval'], '.4f'):>29}"
            f"{'' if name == 'fp32' else _with_interval(more['bits_per_byte'], more['interval'], '+.4f'):>31}"
            f"{found['tokens_per_second']:10.1f}{found['tokens_per_second'] / speed:7.2f}"
        )
    return "\n".join(lines)


def _with_interval(value: float, interval: list[float] | None, form: str) -> str:
    return f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")
