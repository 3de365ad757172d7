"""Save a model with weights in 32, 16, 8 or 4 bits, in formats that `from_pretrained` opens.

- **fp32** and **bf16** only store the weights in another type.
- **int8** (LLM.int8(), Dettmers et al. 2022) and **nf4** with double quantization (QLoRA, Dettmers et al. 2023) are
  those of bitsandbytes. The matrices of the layers stay quantized in memory; the embedding and the head stay in 16
  bits.
- **int4** also quantizes the embedding, and keeps a tied head tied: the file holds their matrix once. Each group of
  `GROUP` weights in a row is rounded to 16 levels at equal distances, from its smallest to its largest weight. The
  format is "pack-quantized" of compressed-tensors. It is small on disk, but in memory its weights are dequantized.
"""

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from healthslm.errors import UserError
from healthslm.files import check_output_folder, replacing
from healthslm.models import open_model
from healthslm.options import Precision
from healthslm.tokenization.encoding import open_tokenizer

if TYPE_CHECKING:
    from compressed_tensors.compressors import ModelCompressor

LIBRARIES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "int4": "compressed_tensors"}
GROUP = 32
"""Consecutive weights of a row that share a scale in int4."""
WIDTHS = {"nf4": 64, "int4": GROUP}
"""The number of columns of each matrix must be a multiple of this; bitsandbytes needs it on some processors."""
OLDEST_TRANSFORMERS = Version("5.24")
"""Older versions can't load an int4 model with a tied head."""


def available_precisions() -> list[Precision]:
    """The precisions that the installed libraries can save and open."""
    return [name for name in get_args(Precision) if _is_installed(name) and (name != "int4" or _has_int4())]


def _is_installed(precision: Precision) -> bool:
    return precision not in LIBRARIES or importlib.util.find_spec(LIBRARIES[precision]) is not None


def _has_int4() -> bool:
    return Version(importlib.metadata.version("transformers")) >= OLDEST_TRANSFORMERS


def check_precision(model: PreTrainedModel, precision: Precision) -> None:
    """Check that a model can be saved in a precision.

    Args:
        model: The model as it was trained.

    Raises:
        ModuleNotFoundError: The library for this precision is not installed.
        UserError: The model is already quantized, has a matrix of another width than the precision supports, or
            Transformers is too old.
    """
    if precision in LIBRARIES:
        importlib.import_module(LIBRARIES[precision])
    name = model.config.name_or_path
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"{name}: is already quantized; give the model that it was made from")
    if precision == "int4" and not _has_int4():
        raise UserError(f"int4 needs Transformers {OLDEST_TRANSFORMERS} or newer; use nf4, or upgrade")
    width = WIDTHS.get(precision, 1)
    for place, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[-1] % width:
            raise UserError(
                f"{name}: {precision} quantizes {width} columns together, but {place} has {module.weight.shape[-1]}; "
                "use int8 or bf16"
            )


def save_in_precision(source: str | Path, precision: Precision, folder: Path, device: torch.device) -> None:
    """Write a model and its tokenizer in a precision into a new folder, as safetensors, which appears once complete.

    Args:
        source: Folder or Hub name of a causal language model that is not quantized.
        folder: May exist if it is empty.
        device: Where to quantize. int8 and nf4 differ a little between devices.

    Raises:
        ModuleNotFoundError: The library for this precision is not installed.
        UserError: There is no such model, it can't be quantized, the folder is not empty, or the disk is full.
    """
    check_output_folder(folder, "a quantized model", lambda _: False)
    check_precision(open_model(source), precision)
    with replacing(folder) as new:
        if precision == "int4":
            _save_int4(source, new)
        else:
            _open(source, device_map={"": device}, **_settings(precision)).save_pretrained(new)
        open_tokenizer(str(source)).save_pretrained(new)


def open_in_precision(folder: Path, device: torch.device) -> PreTrainedModel:
    """Open what `save_in_precision` wrote, in the types of the file."""
    return _open(folder, device_map={"": device}).eval()


def _open(source: str | Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, **settings)


def _settings(precision: Precision) -> dict[str, Any]:
    """The arguments of `from_pretrained`."""
    if precision == "int8":
        # bitsandbytes computes in fp16 anyway. With any other type, it logs a line for each matrix and forward pass.
        return {"dtype": torch.float16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if precision == "nf4":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"dtype": torch.bfloat16, "quantization_config": nf4}
    return {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


def _save_int4(source: str | Path, folder: Path) -> None:
    # The type of the model, not of the tensors in the file, is the one that `from_pretrained` dequantizes to.
    model = _open(source, dtype=torch.float32)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = [name for name, module in model.named_modules() if module is head and head.weight is embedding.weight]
    compressor = _round_to_int4(model, ignore=tied)
    compressor.compress_model(model)
    # Without `dequantize`, Transformers would look for the tied head's matrix among weights that are still packed.
    model.config.quantization_config = compressor.quantization_config.model_dump() | {"dequantize": True}
    weights = {
        name: weight.to(torch.bfloat16) if weight.is_floating_point() else weight
        for name, weight in model.state_dict().items()
        if name.rpartition(".")[0] not in tied
    }
    model.save_pretrained(folder, state_dict=weights)


def _round_to_int4(model: PreTrainedModel, ignore: list[str]) -> "ModelCompressor":
    """Give each linear layer and embedding the scales, in bf16, and zero points of its groups."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear", "Embedding"], weights=weights)
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=ignore)
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            groups = module.weight.detach().float().unflatten(-1, (-1, GROUP))
            scales, zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
            module.weight_scale.data.copy_(scales.to(torch.bfloat16))
            module.weight_zero_point.data.copy_(zero_points)
    return ModelCompressor.from_pretrained_model(model)
