"""Load and create causal language models through the Auto classes, as any user of Transformers does."""

import difflib
import hashlib
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from healthslm.errors import UserError, one_line
from healthslm.files import file_sha256
from healthslm.options import Device, OptionError
from healthslm.repository import model_repository
from healthslm.tokenization.encoding import open_tokenizer, vocabulary_sha256

logger = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # for one file of weights, between our own bars

_RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")


def find_device(device: Device) -> torch.device:
    """The torch device for the option `--device`.

    Raises:
        UserError: A GPU is requested, but PyTorch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: PyTorch {torch.__version__} finds no GPU here; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def by_device(model: PreTrainedModel, cpu: int, gpu: int) -> int:
    """One of two numbers, such as batch sizes, depending on the device of the model."""
    return cpu if model.device.type == "cpu" else gpu


def open_model(source: str | Path, device: Device = "cpu") -> PreTrainedModel:
    """Load a trained model in fp32, from a folder or from the Hub.

    Raises:
        UserError: There is no such model or device, or the model is damaged.
    """
    found = find_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    # RuntimeError: weights of another shape than the configuration's.
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        # A clone without git-lfs has small text files in the place of weights.
        cure = "; get the file again, with `git lfs pull` in a clone" if isinstance(error, SafetensorError) else ""
        raise UserError(f"{source}: can't load a causal language model: {one_line(error)}{cure}") from error
    return model.to(found)


def refuse_adapter(source: str) -> None:
    """Check that a folder holds no adapter, for work that needs a whole model.

    Raises:
        UserError: It does.
    """
    if (Path(source) / "adapter_config.json").exists():
        raise UserError(
            f"{source}: an adapter, not a whole model: use the `merged` folder that fine-tuning with --merge writes"
        )


def make_model(source: str | dict[str, Any]) -> PreTrainedModel:
    """Create the model that a recipe describes, in fp32.

    Args:
        source: A folder or Hub name, to continue training its weights, or to start from new weights if the folder has
            none. Or a mapping with `model_type` and the values that differ from its defaults, to start from new
            weights.

    Raises:
        UserError: There is no such model, or the configuration rejects a value.
    """
    if isinstance(source, str) and not _is_folder_without_weights(source):
        logger.info("weights from %s", source)
        return open_model(source)
    try:
        config = (
            _config_of_type(**source)
            if isinstance(source, dict)
            else AutoConfig.from_pretrained(source, trust_remote_code=True)
        )
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model: {one_line(error)}") from error
    if config.name_or_path and (Path(config.name_or_path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(config.name_or_path)
    return model


def zero_residual_projections(model: PreTrainedModel) -> None:
    """Zero the last matrix of each attention and feed-forward block, so that every layer starts as the identity."""
    for name, parameter in model.named_parameters():
        if name.endswith(_RESIDUAL_PROJECTIONS):
            torch.nn.init.zeros_(parameter)


def check_tokenizer(source: str | dict[str, Any], tokenizer_folder: Path) -> None:
    """Check that pretrained weights belong to the tokenizer of the tokens; new weights fit any tokenizer.

    Raises:
        UserError: The weights were trained with another tokenizer, or their tokenizer can't be loaded.
    """
    if isinstance(source, dict) or _is_folder_without_weights(source):
        return
    try:
        own = vocabulary_sha256(open_tokenizer(source))
    except UserError as error:
        raise UserError(f"{error}; use --accept-changes to train without comparing tokenizers") from error
    other = vocabulary_sha256(open_tokenizer(str(tokenizer_folder)))
    if own != other:
        raise UserError(
            f"{tokenizer_folder}: not the tokenizer of the weights in {source} (SHA-256 {other[:12]}, not {own[:12]}): "
            f"tokenize the corpus with --tokenizer {source}, or use --accept-changes to train on these tokens"
        )


def choose_context(model: PreTrainedModel, context: int | None) -> int:
    """The context to use with a model, in tokens: `context`, by default the model's own.

    Raises:
        OptionError: It is longer than the model's own.
    """
    longest = model.config.max_position_embeddings
    if context is not None and context > longest:
        raise OptionError("context", f"must be at most {longest}, the model's context, not {context}")
    return context or longest


def weights_sha256(source: str) -> str:
    """Checksum of the weights in a folder or of a Hub model. Of a single file, it is the one that sha256sum prints.

    Raises:
        UserError: There is no such model, or it has no weights.
    """
    for pattern in _WEIGHT_FILES:
        try:
            folder = source if Path(source).is_dir() else snapshot_download(source, allow_patterns=pattern)
        except (OSError, ValueError) as error:
            raise UserError(f"{source}: no such model: {one_line(error)}") from error
        checksums = [file_sha256(file) for file in sorted(Path(folder).glob(pattern))]
        if checksums:
            return checksums[0] if len(checksums) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()
    raise UserError(f"{source}: no weights: neither .safetensors nor .bin files")


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's `forward` has this argument."""
    return argument in inspect.signature(model.forward).parameters


def _is_folder_without_weights(source: str) -> bool:
    return Path(source).is_dir() and not any(any(Path(source).glob(pattern)) for pattern in _WEIGHT_FILES)


def _config_of_type(model_type: str | None = None, **overrides: Any) -> PreTrainedConfig:
    if model_type is None:
        raise ValueError("give a model_type, such as healthslm or gpt2, with the values that differ from its defaults")
    if model_type == "healthslm":
        default = AutoConfig.from_pretrained(model_repository(), trust_remote_code=True)
    else:
        default = AutoConfig.for_model(model_type)
    for name in overrides:
        if not hasattr(default, name):
            nearest = difflib.get_close_matches(name, default.to_dict(), n=1, cutoff=0)[0]
            raise ValueError(f"{model_type} has no {name!r}, did you mean {nearest!r}?")
    return type(default)(**overrides, name_or_path=default.name_or_path)
