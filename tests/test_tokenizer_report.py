"""The comparison of tokenizers finds the right terms, and its counts agree with independent ones."""

import json
import random
import re
from pathlib import Path

import pytest
from row_files import write_lines
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from healthslm.errors import UserError
from healthslm.tokenization.terms import find_terms
from healthslm.tokenization.tokenizer_report import (
    TokenizerReportOptions,
    evaluate_tokenizer,
    report_tokenizers,
    tokens_per_term,
)

TEXTS = [
    "Enalapril, 12.5 mg, and amlodipine lowered blood pressure in 1,024 patients with nephropathy (p<0.05).",
    "TP53 and BRCA1 are mutated in carcinomas; IL-6 rises in rheumatoid arthritis and in anaemia.",
    "Omeprazole for oesophagitis: 95% were healed after 8 weeks, and p53 was unchanged.",
    "The patients were asked again on the next day.",
]


def found(text: str) -> dict[str, list[str]]:
    return {name: [text[start:end] for start, end in spans] for name, spans in find_terms(text).items()}


def write_documents(path: Path, texts: list[str]) -> Path:
    return write_lines(path, ({"text": text} for text in texts))


def make_report(tokenizers: list[Path], data: list[Path], output: Path) -> dict:
    report_tokenizers(TokenizerReportOptions([str(name) for name in tokenizers], [str(path) for path in data], output))
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_terms_that_a_reader_sees_are_found():
    terms = found(" ".join(TEXTS))
    assert terms["drugs"] == ["Enalapril", "amlodipine", "Omeprazole"]
    assert terms["genes"] == ["TP53", "BRCA1", "IL-6", "p53"]
    assert terms["diseases"] == ["nephropathy", "carcinomas", "arthritis", "anaemia", "oesophagitis"]
    assert terms["numbers"] == ["12.5", "1,024", "0.05", "95", "8"]
    assert terms["words"][:8] == ["Enalapril", "12", "5", "mg", "and", "amlodipine", "lowered", "blood"]


@pytest.mark.parametrize(
    "lookalikes",
    [
        "April, mongrel, a cholesterol concept, ghrelin and somatostatin",
        "MRI of COVID-19 at FEV1 under CO2, SF-36, PGE2, HPV16 and ICD10",
        "Diagnosis and prognosis of apoptosis, aroma of theobroma, schistosoma in the stroma, sympathy, Thomas",
        "IL-6, H1N1, x86, vitamin B12, version 1.2.3",
    ],
)
def test_words_that_look_like_terms_are_left_out(lookalikes):
    terms = found(lookalikes)
    assert terms["drugs"] == terms["diseases"] == terms["numbers"] == []
    assert terms["genes"] == (["IL-6"] if "IL-6" in lookalikes else [])


def test_an_exception_does_not_hide_words_that_contain_it():
    assert found("enalapril and trandolapril")["drugs"] == ["enalapril", "trandolapril"]
    assert found("neurofibroma and xanthomas")["diseases"] == ["neurofibroma", "xanthomas"]


def test_tokens_that_overlap_a_term_are_counted():
    # "IL-6," in "of IL-6, now" with tokens: "of", " IL", "-", "6,", a token of no character, " now".
    offsets = [(0, 2), (2, 5), (5, 6), (6, 8), (8, 8), (8, 12)]
    terms = find_terms("of IL-6, now")
    assert tokens_per_term(offsets, terms["genes"]).tolist() == [3]
    assert tokens_per_term(offsets, terms["words"]).tolist() == [1, 1, 1, 1]
    assert tokens_per_term(offsets[::-1], terms["genes"]).tolist() == [3]


def test_tokens_per_term_agree_with_the_spelling_of_the_tokens(sample_folders):
    """Counted without offsets: the tokens of plain ASCII text, joined, spell it."""
    plain = Tokenizer.from_file(str(sample_folders.tokenizer / "tokenizer.json"))
    figures = evaluate_tokenizer(
        AutoTokenizer.from_pretrained(sample_folders.tokenizer), TEXTS, [find_terms(text) for text in TEXTS]
    )
    counts = {name: [] for name in figures["terms"]}
    for text in TEXTS:
        tokens = plain.encode(text, add_special_tokens=False).tokens
        owners = [number for number, token in enumerate(tokens) for _ in token]
        assert len(owners) == len(text)
        for name, spans in find_terms(text).items():
            counts[name] += [len(set(owners[start:end])) for start, end in spans]
    for name, of_class in counts.items():
        assert figures["terms"][name]["tokens_per_term"] == pytest.approx(sum(of_class) / len(of_class))
        assert figures["terms"][name]["single_token_share"] == pytest.approx(of_class.count(1) / len(of_class))


def test_text_that_spells_out_a_special_token_is_counted_as_text(sample_folders):
    text = "a<|endoftext|>b"
    plain = Tokenizer.from_file(str(sample_folders.tokenizer / "tokenizer.json"))
    plain.encode_special_tokens = True
    figures = evaluate_tokenizer(AutoTokenizer.from_pretrained(sample_folders.tokenizer), [text], [find_terms(text)])
    assert figures["tokens"] == len(plain.encode(text, add_special_tokens=False)) > 3


def test_gpt2_on_pubmedqa_agrees_with_the_tokenizers_library(test_data, tmp_path):
    gpt2, files = test_data / "tokenizers" / "gpt2", sorted((test_data / "pubmedqa").glob("*.jsonl"))
    report = make_report([gpt2], [test_data / "pubmedqa" / "*.jsonl"], tmp_path / "report.json")
    rows = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    texts = ["\n".join([row["QUESTION"], *row["CONTEXTS"]]) for row in rows]
    num_bytes = sum(len(text.encode()) for text in texts)
    plain = Tokenizer.from_file(str(gpt2 / "tokenizer.json"))
    tokens = sum(len(plain.encode(text, add_special_tokens=False)) for text in texts)
    assert (report["documents"], report["bytes"]) == (1000, num_bytes)
    figures = report["tokenizers"][str(gpt2)]
    assert (figures["vocabulary"], figures["tokens"], figures["documents_restored"]) == (50_257, tokens, 1000)
    assert figures["bytes_per_token"] == pytest.approx(num_bytes / tokens)


def test_the_order_of_documents_and_tokenizers_does_not_matter(sample_folders, tmp_path):
    lower_case = save_lower_casing(sample_folders.tokenizer, tmp_path / "lower")
    tokenizers = [sample_folders.tokenizer, lower_case]
    texts = TEXTS * 100  # more than one batch
    one_way = make_report(tokenizers, [write_documents(tmp_path / "documents.jsonl", texts)], tmp_path / "a.json")
    random.Random(0).shuffle(texts)
    other = make_report(tokenizers[::-1], [write_documents(tmp_path / "documents.jsonl", texts)], tmp_path / "b.json")
    assert one_way == other


def save_lower_casing(folder: Path, output: Path) -> Path:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = Lowercase()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(output)
    return output


def test_documents_that_decoding_changes_are_counted(sample_folders, tmp_path):
    lower_case = save_lower_casing(sample_folders.tokenizer, tmp_path / "lower")
    texts = ["Aspirin", "aspirin", "  two  spaces .", "<|endoftext|> and ' s", "é\u2009β"]
    data = [write_documents(tmp_path / "documents.jsonl", [f"x{text}x" for text in texts])]
    report = make_report([sample_folders.tokenizer, lower_case], data, tmp_path / "report.json")
    restored = [figures["documents_restored"] for figures in report["tokenizers"].values()]
    assert restored == [5, 4]


def test_the_script_prints_the_metrics_that_it_writes(run_script, sample_folders, tmp_path):
    data, output = write_documents(tmp_path / "documents.jsonl", TEXTS[3:]), tmp_path / "report.json"
    arguments = ["--tokenizers", sample_folders.tokenizer, "--data", data, "--output", output]
    done = run_script("evaluate_tokenizer", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    figures = report["tokenizers"][str(sample_folders.tokenizer)]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in done.stdout.splitlines() if line.startswith("|")]
    overall, by_class = rows[2], rows[5]
    assert overall[1:] == ["512", str(figures["tokens"]), f"{figures['bytes_per_token']:.3f}", "100.0%"]
    assert by_class[1].startswith(f"{figures['terms']['words']['tokens_per_term']:.2f} (")
    assert by_class[2:] == ["none"] * 4
    assert figures["terms"]["drugs"] == {"tokens_per_term": None, "single_token_share": None}


def test_a_missing_tokenizer_is_reported_in_one_line(run_script, tmp_path):
    data = write_documents(tmp_path / "documents.jsonl", TEXTS)
    done = run_script(
        "evaluate_tokenizer", "--tokenizers", tmp_path / "none", "--data", data, "--output", tmp_path / "o"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'none'}: no such folder or tokenizer on the Hub"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": ""}, "no document has any text"),
        ({"body": "a"}, "row 1: no column text or abstract or CONTEXTS; the columns are body"),
    ],
)
def test_data_without_text_is_rejected(sample_folders, tmp_path, row, complaint):
    (tmp_path / "documents.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        make_report([sample_folders.tokenizer], [tmp_path / "documents.jsonl"], tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


def test_an_output_that_is_a_folder_is_rejected_and_kept(sample_folders, tmp_path):
    data = write_documents(tmp_path / "documents.jsonl", TEXTS)
    with pytest.raises(UserError, match=f"^{tmp_path}: is a folder, but the output is a file"):
        make_report([sample_folders.tokenizer], [data], tmp_path)
    assert data.exists()
