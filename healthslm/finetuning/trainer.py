"""TRL's trainer with the settings of a run, and with a loss that computes only the logits that it needs."""

import sys
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig, SFTTrainer

from healthslm.finetuning.adapters import base_of
from healthslm.finetuning.console import show_metrics
from healthslm.finetuning.examples import IGNORED, Examples
from healthslm.finetuning.options import FinetuneOptions
from healthslm.finetuning.run import CHECKPOINTS, TENSORBOARD, on_one_gpu
from healthslm.models import accepts, find_device
from healthslm.training.precision import computes_in_bf16

LEARNING_RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-4}


def make_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Examples,
    validation: Examples | None,
    options: FinetuneOptions,
    context: int,
) -> SFTTrainer:
    """TRL's trainer for the options of a run."""
    bf16 = computes_in_bf16(find_device(options.device))
    # A fraction of the steps. With a single evaluation, an interval that only the end of training reaches.
    interval = 1 / options.evaluations if options.evaluations > 1 else sys.maxsize
    rate = options.learning_rate if options.learning_rate is not None else LEARNING_RATES[options.method]
    micro_batch_size = min(options.micro_batch_size, options.batch_size)
    arguments = SFTConfig(
        output_dir=str(options.output / CHECKPOINTS),
        max_length=context,
        packing=options.packing,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=micro_batch_size,
        gradient_accumulation_steps=options.batch_size // micro_batch_size,
        gradient_checkpointing=options.gradient_checkpointing,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        bf16=bf16,
        use_cpu=options.device == "cpu",
        eval_strategy="steps" if validation else "no",
        eval_steps=interval,
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=validation is not None,
        metric_for_best_model="eval_loss" if validation else None,
        prediction_loss_only=True,
        logging_first_step=True,
        logging_steps=0.02,
        logging_nan_inf_filter=False,
        report_to="none" if options.report_to == "tensorboard" else options.report_to,
        run_name=options.output.name,
        seed=options.seed,
        dataloader_pin_memory=False,
    )
    callbacks: list[TrainerCallback] = []
    if options.report_to == "tensorboard":  # whose files would end with the checkpoints
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(options.output / TENSORBOARD)))
    if validation is not None and options.patience is not None:
        callbacks.append(EarlyStoppingCallback(options.patience))
    trainer = CompletionTrainer(
        model=model,
        args=on_one_gpu(arguments),
        train_dataset=_as_dataset(training),
        eval_dataset=_as_dataset(validation) if validation else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    show_metrics(trainer, {"loss": "loss", "eval_loss": "validation loss"})
    if not bf16:  # TRL turns adapters on 4-bit weights into bf16
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    return trainer


class CompletionTrainer(SFTTrainer):
    """TRL's SFTTrainer, but the head computes logits only where there is a label.

    Most tokens of a prompt with a short completion have none, and the head is half of the work of a small model. TRL
    does the same on GPUs alone. The loss is the same.
    """

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if return_outputs or not accepts(base_of(self.accelerator.unwrap_model(model)), "logits_to_keep"):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[:, 1:]
        places = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
        logits = model(**inputs, use_cache=False, logits_to_keep=places).logits
        targets = labels[:, places]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        if num_items_in_batch is None:
            return loss / (targets != IGNORED).sum().clamp(min=1)
        return loss * self.accelerator.num_processes / num_items_in_batch

    def create_model_card(self, *arguments: Any, **settings: Any) -> None:
        """Write none: the output has a card of its own."""


def _as_dataset(examples: Examples) -> Dataset:
    columns = ("input_ids", "labels")
    return Dataset.from_dict({name: [getattr(example, name) for example in examples.examples] for name in columns})
