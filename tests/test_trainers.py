"""Hugging Face's Trainer and TRL's SFTTrainer train HealthSLM like any model of Transformers."""

from pathlib import Path

import datasets
import peft
import pytest
import torch
import trl
from tiny_models import byte_model, byte_tokenizer, random_ids
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


def arguments(folder: Path, **options) -> dict:
    """Arguments of both trainers."""
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    return {"output_dir": str(folder), **quiet, **steps, **options}


def examples() -> list[dict]:
    """Four sequences of twelve tokens, each with fewer labels than the one before."""
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in random_ids(4, 12)]
    for index, row in enumerate(rows):
        row["labels"][: 3 * index] = [-100] * 3 * index
    return rows


def skipping_logits(rows: list[dict]) -> dict:
    return {**default_data_collator(rows), "skip_logits": True}


def trainer(folder: Path, model: PreTrainedModel | None = None, collator=default_data_collator, **options) -> Trainer:
    return Trainer(
        model=model or byte_model(),
        args=TrainingArguments(**arguments(folder, **options)),
        train_dataset=examples(),
        eval_dataset=examples(),
        data_collator=collator,
        processing_class=byte_tokenizer(),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def load(folder: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=random_ids(2, 9)).logits


def test_the_trainer_saves_the_trained_weights(tmp_path: Path) -> None:
    training = trainer(tmp_path, max_steps=4)
    training.train()
    assert losses(training)[-1] < losses(training)[0]
    training.save_model()
    torch.testing.assert_close(logits(load(tmp_path)), logits(training.model), rtol=0, atol=0)


def test_the_trainer_predicts_logits_without_a_cache(tmp_path: Path) -> None:
    predicting = trainer(tmp_path)
    predictions = predicting.predict(examples()).predictions
    with torch.no_grad():
        expected = predicting.model(input_ids=random_ids(4, 12)).logits
    torch.testing.assert_close(torch.from_numpy(predictions), expected)


def test_a_resumed_training_ends_with_the_same_weights_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)


@pytest.mark.parametrize("collator", [default_data_collator, skipping_logits])
def test_gradient_accumulation_gives_every_token_the_same_weight(collator, tmp_path: Path) -> None:
    def trained(batch_size: int) -> dict[str, torch.Tensor]:
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        training = trainer(tmp_path, collator=collator, optim="sgd", max_grad_norm=0, **options)
        training.train()
        return weights(training.model)

    torch.testing.assert_close(trained(batch_size=1), trained(batch_size=4))


def test_skipping_the_logits_changes_neither_training_nor_evaluation(tmp_path: Path) -> None:
    def trained(collator) -> tuple[dict[str, torch.Tensor], float]:
        training = trainer(tmp_path, collator=collator)
        training.train()
        return weights(training.model), training.evaluate()["eval_loss"]

    plain_weights, plain_loss = trained(default_data_collator)
    skipping_weights, skipping_loss = trained(skipping_logits)
    torch.testing.assert_close(skipping_weights, plain_weights)
    assert skipping_loss == pytest.approx(plain_loss)


def loss_one_by_one(model: PreTrainedModel, documents: list[torch.Tensor]) -> torch.Tensor:
    """Mean loss over the tokens of documents (length,) in separate forward passes."""
    losses = [cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum") for ids in documents]
    return sum(losses) / sum(len(ids) - 1 for ids in documents)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("bounds", [False, True])
def test_transformers_flattened_batches_keep_documents_apart(attention: str, bounds: bool) -> None:
    model = byte_model(attention=attention)
    documents = [random_ids(20)[:7], random_ids(20)[7:11], random_ids(20)[11:]]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=bounds)
    batch = collator([{"input_ids": ids.tolist()} for ids in documents])
    torch.testing.assert_close(model(**batch).loss, loss_one_by_one(model, documents))


def sentences():
    drugs = ("Aspirin", "Ibuprofen", "Metformin", "Insulin glargine", "Warfarin", "Amoxicillin")
    return datasets.Dataset.from_list([{"text": f"{drug} was given."} for drug in drugs])


def sft_trainer(folder: Path, model: PreTrainedModel | str, dataset=None, peft_config=None, **options):
    options = {"bf16": False, "max_length": 48, **options}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(folder, **options)),
        train_dataset=dataset or sentences(),
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("packing", [False, True])
def test_sft_saves_the_trained_weights(packing: bool, tmp_path: Path) -> None:
    base, trained = tmp_path / "base", tmp_path / "trained"
    byte_model().save_pretrained(base)
    training = sft_trainer(trained, str(base), packing=packing, trust_remote_code=True, max_steps=4)
    training.train()
    assert losses(training)[-1] < losses(training)[0]
    training.save_model()
    torch.testing.assert_close(logits(load(trained)), logits(training.model), rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sft_packing_keeps_documents_apart(attention: str, tmp_path: Path) -> None:
    model = byte_model(attention=attention)
    training = sft_trainer(tmp_path, model, packing=True)
    batch = next(iter(training.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    documents = batch["input_ids"][0].tensor_split(starts[1:])
    assert len(documents) > 2
    model.eval()
    torch.testing.assert_close(training.compute_loss(model, batch), loss_one_by_one(model, documents))


def test_sft_trains_an_adapter_on_completions(tmp_path: Path) -> None:
    dataset = sentences().map(lambda row: {"prompt": row["text"][:-6], "completion": row["text"][-6:]})
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    training = sft_trainer(tmp_path, byte_model(), dataset.remove_columns("text"), lora)
    batch = next(iter(training.get_train_dataloader()))
    assert ((batch["labels"] != -100).sum(-1) == len("given.") + 1).all()  # and the separator that ends it
    training.train()
    training.save_model()
    restored = peft.PeftModel.from_pretrained(byte_model(), tmp_path)
    torch.testing.assert_close(logits(restored), logits(training.model), rtol=0, atol=0)
