"""The released model works with torch and transformers alone and has the results of its card."""

import hashlib
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from clean_process import result_of, start_clean_process
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from healthslm.evaluation.held_out import measure_held_out
from healthslm.evaluation.metrics import METRICS

NOT_NEEDED = (
    "accelerate", "bitsandbytes", "datasets", "datatrove", "duckdb", "jinja2", "jsonargparse", "lm_eval", "lxml",
    "matplotlib", "pandas", "peft", "pyarrow", "scipy", "sklearn", "trl",
)  # fmt: skip


def write_and_score(folder: str, documents: str) -> dict:
    """Run in a clean process: score documents one at a time, in windows that overlap by half, and generate text."""
    import math
    import pathlib

    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    context = model.config.max_position_embeddings
    bits = num_bytes = 0
    with torch.no_grad():
        for text in json.loads(pathlib.Path(documents).read_text(encoding="utf-8")):
            ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
            scored = 0
            while scored < len(ids) - 1:
                start = max(scored - context // 2, 0)
                window = ids[start : start + context + 1]
                log_probabilities = model(window[None, :-1]).logits[0].log_softmax(-1)
                costs = -log_probabilities.gather(1, window[1:, None])[:, 0] / math.log(2)
                bits += costs[scored - start :].double().sum().item()
                scored = start + len(window) - 1
            num_bytes += len(text.encode())
    write = transformers.pipeline("text-generation", model=folder, trust_remote_code=True)
    return {
        "bits_per_byte": bits / num_bytes,
        "written": write("Vitamin D and the risk of", max_new_tokens=20)[0]["generated_text"],
    }


def held_out_texts(test_data: Path) -> list[str]:
    rows = pq.read_table(test_data / "corpus/validation.parquet").to_pylist()
    return [f"{row['title']}\n{row['text']}" if row["title"] else row["text"] for row in rows]


def in_clean_process(repository: Path, tmp_path: Path, texts: list[str]) -> dict:
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    arguments = (write_and_score, repository, tmp_path / "texts.json")
    return result_of(start_clean_process(tmp_path / "home", *arguments, without=NOT_NEEDED), timeout=1800)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_it_generates_and_scores_with_torch_and_transformers_alone(repository, test_data, tmp_path):
    """Including the longest documents, which need two windows."""
    texts = sorted(held_out_texts(test_data)[:200], key=len)[-12:]
    found = in_clean_process(repository, tmp_path, texts)
    model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
    assert any(len(tokenizer.encode(text)) > model.config.max_position_embeddings for text in texts)
    measured = measure_held_out(model, tokenizer, [{"title": "", "text": text} for text in texts])
    assert found["bits_per_byte"] == pytest.approx(measured["bits_per_byte"], rel=1e-4)
    assert found["written"].startswith("Vitamin D and the risk of") and len(found["written"].split()) > 10


@pytest.mark.slow
def test_it_has_the_bits_per_byte_of_its_card(repository, test_data, tmp_path):
    """On every twentieth document, whose interval is wider by the root of twenty than that of all."""
    in_card = float(re.search(r"\*\*(\d\.\d+) bits per byte\*\*", (repository / "README.md").read_text())[1])
    lower, upper = read_json(repository / "results/held_out.json")["model"]["interval"]
    found = in_clean_process(repository, tmp_path, held_out_texts(test_data)[::20])
    assert found["bits_per_byte"] == pytest.approx(in_card, abs=20**0.5 * (upper - lower) / 2)


def test_the_documents_and_the_results_belong_to_these_weights(repository):
    path = repository / "model.safetensors"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    for page in ("docs/evaluation.md", "docs/training-data.md"):
        assert f"`{checksum}`" in (repository / page).read_text(encoding="utf-8")
    for name, metric in METRICS.items():
        found = read_json(repository / f"results/{name}.json")
        assert (found["version"], tuple(found["inputs"])) == (metric.version, metric.inputs)
        assert found["inputs"].get("model", checksum) == checksum
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_card_gives_the_share_of_documents_without_a_stated_license(repository):
    table = (repository / "docs/training-data.md").read_text(encoding="utf-8").partition("| license as stated |")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| [\d,]+ \|$", table.partition("## Input files")[0], re.MULTILINE)
    documents = {license: int(count.replace(",", "")) for license, count in rows}
    share = documents["unstated"] / sum(documents.values())
    assert f"{share:.0%} of the documents come without one" in (repository / "README.md").read_text(encoding="utf-8")


def test_its_weights_load_as_fp32_by_default(repository):
    """Although the file is in bf16, which Transformers would load if config.json named no type."""
    for named, expected in [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
    ]:
        model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, **named)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_the_metadata_of_the_card_contain_the_results(repository):
    data = ModelCard.load(repository / "README.md").data
    found = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
    bits = read_json(repository / "results/held_out.json")["model"]["bits_per_byte"]
    assert found["held-out-abstracts", "bits_per_byte"] == pytest.approx(bits, abs=5e-5)
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
