"""The model that is fine-tuned: its weights, in 4 bits for QLoRA, and its adapter."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from healthslm.errors import UserError, one_line
from healthslm.finetuning.options import FinetuneOptions
from healthslm.models import find_device, open_model
from healthslm.options import OptionError
from healthslm.training.precision import computes_in_bf16


def open_base(source: str, options: FinetuneOptions) -> PreTrainedModel:
    """Load the base model: in fp32, or in 4 bits for `--method qlora`.

    Raises:
        UserError: There is no such model or device, bitsandbytes is missing, or the model can't be loaded in 4 bits.
    """
    if options.method != "qlora":
        return open_model(source, options.device)
    if not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--method qlora: bitsandbytes is not installed: pip install bitsandbytes, or use --method lora")
    device = find_device(options.device)
    dtype = torch.bfloat16 if computes_in_bf16(device) else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=True,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{source}: can't load it in 4 bits: {one_line(error)}") from error
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def add_adapter(model: PreTrainedModel, options: FinetuneOptions) -> PreTrainedModel | PeftModel:
    """Add the adapter of `--method lora` and `qlora` (LoRA, Hu et al. 2021), with the seed of the options.

    Raises:
        OptionError: A layer to adapt doesn't exist, or is the head or the embedding.
    """
    if options.method == "full":
        return model
    _check_targets(model, options.target_modules)
    targets: str | list[str] = options.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    set_seed(options.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, config)


def merge_adapter(source: str, adapter: Path) -> PreTrainedModel:
    """The base model in fp32 with the adapter of a folder merged into its weights."""
    return PeftModel.from_pretrained(open_model(source), adapter).merge_and_unload()


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without PEFT's wrapper, with the adapter's layers in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def check_packing(model: PreTrainedModel, options: FinetuneOptions) -> None:
    """Check that packed examples don't attend to each other.

    Raises:
        UserError: With restarting `position_ids`, the model attends to the other examples of a sequence.
    """
    model.eval()
    ids = torch.arange(2, 10, device=model.device)
    places = torch.arange(4, device=model.device)
    alone = model(input_ids=ids[None, 4:], position_ids=places[None], use_cache=False).logits
    packed = model(input_ids=ids[None], position_ids=places.repeat(2)[None], use_cache=False).logits[:, 4:]
    if not torch.allclose(alone, packed, atol=1e-2 * float(alone.abs().max())):
        raise UserError(
            f"{options.model}: with several examples in a sequence, this model mixes them up: use --packing false"
        )


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Raise OptionError if a layer doesn't exist, or is the head or the embedding."""
    excluded = (model.get_input_embeddings(), model.get_output_embeddings())
    layers: dict[str, bool] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if module in excluded:
            layers[name] = False
        elif isinstance(module, torch.nn.Linear | Conv1D):
            layers[name] = True
    names = ", ".join(sorted(name for name, allowed in layers.items() if allowed))
    for target in targets:
        if target == "all-linear" and len(targets) == 1:
            continue
        if layers.get(target) is False:
            problem = f"{target} is the embedding or the head, which can't be adapted"
            raise OptionError("target_modules", f"{problem}; choose from {names}")
        if target not in layers:
            raise OptionError("target_modules", f"the model has no linear layer {target!r}; choose from {names}")
