"""Artificial questions for PubMedQA: questions from statements, contexts without conclusions, decontamination."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import write_lines

from healthslm.documents import DOCUMENT_SCHEMA
from healthslm.errors import UserError
from healthslm.evaluation.question_answering import pubmedqa_task
from healthslm.pubmedqa.artificial import build_pubmedqa_artificial, input_text, read_questions, select
from healthslm.pubmedqa.conclusions import divide
from healthslm.pubmedqa.options import ArtificialQuestionsOptions
from healthslm.pubmedqa.statements import question_of

YES = {
    "Metformin reduces mortality in septic shock: a cohort study.": "Does metformin reduce mortality in septic shock?",
    "Statins reduce mortality in patients with sepsis.": "Do statins reduce mortality in patients with sepsis?",
    "Sleep duration is associated with obesity in children": "Is sleep duration associated with obesity in children?",
    "Serum ferritin and CRP are independent predictors of stroke.": (
        "Are serum ferritin and CRP independent predictors of stroke?"
    ),
    "[Diabetes mellitus is a risk factor for postoperative infection].": (
        "Is diabetes mellitus a risk factor for postoperative infection?"
    ),
    "Curcumin suppresses NF-kappaB and reduces joint damage in rats": (
        "Does curcumin suppress NF-kappaB and reduce joint damage in rats?"
    ),
    "Early mobilization modifies recovery": "Does early mobilization modify recovery?",
    "Exercise significantly improves walking in Parkinson's disease": (
        "Does exercise significantly improve walking in Parkinson's disease?"
    ),
    "Patients with COPD have impaired balance": "Do patients with COPD have impaired balance?",
    "Mortality has increased among dialysis patients": "Has mortality increased among dialysis patients?",
    "Ultrasound can detect deep vein thrombosis in the calf": "Can ultrasound detect deep vein thrombosis in the calf?",
    "Obesity was related to longer hospital stay": "Is obesity related to longer hospital stay?",
    "Aspirin Reduces Pain After Surgery In Children": "Does aspirin reduce pain after surgery in children?",
    "t(8;21) is a marker of good prognosis in leukemia": "Is t(8;21) a marker of good prognosis in leukemia?",
    "These results suggest that smoking increases the risk of cataract.": "Does smoking increase the risk of cataract?",
    "There was an increase in length of stay.": "Is there an increase in length of stay?",
}
NO = {
    "Aspirin does not prevent dementia in older adults": "Does aspirin prevent dementia in older adults?",
    "Vitamin D levels are not associated with asthma": "Are vitamin D levels associated with asthma?",
    "Oral zinc has no effect on growth in infants": "Does oral zinc have an effect on growth in infants?",
    "No association between coffee and pancreatic cancer: a meta-analysis.": (
        "Is there an association between coffee and pancreatic cancer?"
    ),
    "Lack of effect of beta-carotene on serum lipids": "Is there an effect of beta-carotene on serum lipids?",
    "Metformin fails to improve survival in lung cancer": "Does metformin improve survival in lung cancer?",
    "Screening did not lower mortality in the trial": "Does screening lower mortality in the trial?",
    "There was no difference in survival between the groups.": "Is there a difference in survival between the groups?",
    "Oral iron did not cause any change in appetite": "Does oral iron cause change in appetite?",
    "Robotic surgery is no better than open surgery": "Is robotic surgery better than open surgery?",
    "CT cannot replace biopsy in suspected vasculitis": "Can CT replace biopsy in suspected vasculitis?",
    "However, sigma54 mutants do not enter the salivary glands": "Do sigma54 mutants enter the salivary glands?",
    "Chorea was not related to age but to sex and smoking": "Is chorea related to age?",
    "In conclusion, early feeding does not increase complications.": "Does early feeding increase complications?",
}
REFUSED = [
    "Effects of aspirin on platelet aggregation in healthy men",
    "A randomized trial of vitamin D in older adults",
    "Vitamin D in multiple sclerosis: a review",
    "Risk factors that predict mortality in sepsis",
    "Strategies to reduce and prevent falls in hospitals",
    "Does aspirin prevent dementia?",
    "How statins reduce mortality in sepsis",
    "Tea drinking may reduce the risk of stroke",
    "Health needs assessment in rural areas",
    "Dose increases in patients with chronic pain",
    "Further research is needed in this population",
    "It is a risk factor for stroke in the elderly",
    "No evidence was found for an effect of zinc",
    "Despite treatment, patients with sepsis fail to recover quickly",
    "Bigger Is Not Always Better: Effects of Electrocautery",
    "There is a need for better treatment of asthma",
    "Not only smoking increases the risk of stroke",
    "Aspirin is not only a painkiller",
    "Aspirin therapy alone has no: a review",
    "Results",
]
CONTEXT = (
    "the metformin statins sleep serum diabetes curcumin early exercise patients mortality ultrasound obesity aspirin "
    "reduces pain after surgery children smoking vitamin oral screening robotic chorea"
)


@pytest.mark.parametrize("answer, questions", [("yes", YES), ("no", NO)])
def test_a_statement_becomes_a_question_whose_answer_is_its_polarity(answer: str, questions: dict[str, str]) -> None:
    assert {statement: question_of(statement, CONTEXT) for statement in questions} == {
        statement: (question, answer) for statement, question in questions.items()
    }


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_surely_a_statement_is_refused(text: str) -> None:
    assert question_of(text, CONTEXT) is None


def test_names_keep_their_capitals() -> None:
    question = question_of("Helicobacter pylori causes gastric ulcers", "patients with Helicobacter pylori")
    assert question is not None and question.text == "Does Helicobacter pylori cause gastric ulcers?"


def sections(*named: tuple[str, str, str]) -> tuple[str, list[dict]]:
    """The text and the sections of an abstract, as a corpus has them."""
    text, found = "", []
    for label, category, content in named:
        text += (" " if text else "") + f"{label}: "
        found.append({"label": label, "category": category, "start": len(text), "end": len(text) + len(content)})
        text += content
    return text, found


def test_a_structured_abstract_loses_its_conclusion_and_what_follows() -> None:
    text, found = sections(
        ("AIM", "OBJECTIVE", "To see."),
        ("RESULTS", "RESULTS", "It was 5."),
        ("CONCLUSION", "CONCLUSIONS", "It helps. It is safe."),
        ("FUNDING", "", "None."),
    )
    assert divide(text, found) == (["To see.", "It was 5."], ["AIM", "RESULTS"], ["It helps.", "It is safe."])


@pytest.mark.parametrize("label", ["CONCLUSIONS", "Conclusion", "INTERPRETATION", "Conclusions and implications"])
def test_labels_in_the_text_part_it_too(label: str) -> None:
    abstract = divide(f"BACKGROUND: We asked. RESULTS: 5 (95% CI: 4 to 6) of 9. {label}: It helps.")
    assert abstract == (["We asked.", "5 (95% CI: 4 to 6) of 9."], ["BACKGROUND", "RESULTS"], ["It helps."])


def test_an_unlabeled_abstract_loses_its_last_sentences_from_the_one_that_concludes() -> None:
    assert divide("We asked. It was 0.5 in E. coli. It helps.") == (
        ["We asked. It was 0.5 in E. coli."],
        [""],
        ["It helps."],
    )
    assert divide("We asked. It was 5. These results suggest benefit. It is safe.") == (
        ["We asked. It was 5."],
        [""],
        ["These results suggest benefit.", "It is safe."],
    )


def test_a_context_keeps_the_brackets_and_quotes_that_close_its_sentences() -> None:
    context = 'We asked some (n = 5.) 2 of them said "It helps." (None said "no.") [It was 5!]\nIt ended.'
    assert divide(f"{context} 3 died.") == ([" ".join(context.split())], [""], ["3 died."])


def test_an_abstract_without_a_conclusion_or_a_context_is_refused() -> None:
    assert divide("BACKGROUND: We asked. RESULTS: It was 5.") is None
    assert divide("It helps.") is None


FILLER = " ".join(f"Measurement {number} was taken in patient {number * 7} at noon." for number in range(12))


def abstract(pmid: int, title: str, text: str = FILLER, part: int = 1) -> dict:
    return {
        "id": f"pmid:{pmid}",
        "part": part,
        "title": title,
        "text": f"{text} Outcome {pmid} was recorded. It ended.",
        "source": "pubmed",
        "kind": "abstract",
        "license": "",
        "year": 2000,
        "sections": [],
    }


SHARED = "Thirteen words in a row of the expert question are more than enough to recognize it here."
EXPERT = {
    "pmid": "900",
    "QUESTION": "Does ginger relieve nausea in pregnancy?",
    "CONTEXTS": ["We asked.", SHARED],
    "LONG_ANSWER": "It does.",
    "final_decision": "maybe",
}
ABSTRACTS = [
    *(abstract(number, f"Drug {number} reduces pain in adults") for number in range(1, 31)),
    *(abstract(number, f"Drug {number} does not reduce pain in adults") for number in range(31, 36)),
    abstract(36, "Effects of garlic on blood pressure"),
    abstract(37, "Zinc is not useful in colds", text="Too short."),
    abstract(900, "Ginger does not help against nausea"),  # the id of an expert question
    abstract(38, "Ginger does not relieve nausea in pregnancy"),  # its question
    abstract(39, "Ginger does not help in travel sickness", text=f"{FILLER} {SHARED}"),  # its text
    abstract(40, "Garlic does not lower blood pressure", part=1),
    abstract(40, "Garlic does not lower blood pressure", part=2),
    {**abstract(41, "Honey does not soothe a cough"), "kind": "fulltext"},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train").mkdir()
    pq.write_table(pa.Table.from_pylist(ABSTRACTS, DOCUMENT_SCHEMA), folder / "train" / "pubmed.parquet")
    write_lines(folder / "expert.jsonl", [EXPERT])
    return folder


def build(corpus: Path, output: Path, **more) -> tuple[list[dict], dict]:
    inputs = {"corpus": corpus, "held_out": [corpus / "expert.jsonl"]}
    build_pubmedqa_artificial(ArtificialQuestionsOptions(**inputs | more, output=output))
    return read_questions(output / "questions.jsonl"), json.loads((output / "report.json").read_text())


def test_abstracts_that_share_an_id_a_question_or_text_with_expert_questions_are_dropped(
    corpus: Path, tmp_path: Path
) -> None:
    questions, report = build(corpus, tmp_path / "out", yes_per_no=0)
    dropped = {name: report["dropped"][name] for name in ("held_out_id", "held_out_title", "held_out_overlap")}
    assert dropped == {"held_out_id": 1, "held_out_title": 1, "held_out_overlap": 1}
    assert {row["pmid"] for row in questions} == {str(number) for number in range(1, 36)}
    assert report["kept"] == {"title": {"no": 5, "yes": 30}}
    assert (report["dropped"]["no_statement"], report["dropped"]["short_context"]) == (1, 1)


def test_the_report_names_all_held_out_files(corpus: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "expert.jsonl", [EXPERT | {"pmid": "901"}])
    _, report = build(corpus, tmp_path / "out", held_out=[corpus / "expert.jsonl", other])
    assert [file["name"] for file in report["held_out"]] == ["expert.jsonl", "expert.jsonl"]
    assert len({file["sha256"] for file in report["held_out"]}) == 2


def test_the_ratio_of_answers_is_an_option_and_the_choice_does_not_change(corpus: Path, tmp_path: Path) -> None:
    questions, _ = build(corpus, tmp_path / "a", yes_per_no=2)
    answers = [row["final_decision"] for row in questions]
    assert (answers.count("yes"), answers.count("no")) == (10, 5)
    build(corpus, tmp_path / "b", yes_per_no=2)
    assert (tmp_path / "a/questions.jsonl").read_bytes() == (tmp_path / "b/questions.jsonl").read_bytes()
    assert not all(answer == "yes" for answer in answers[:10]) and not all(answer == "no" for answer in answers[10:])
    fewer = {row["pmid"] for row in build(corpus, tmp_path / "c", yes_per_no=1)[0]}
    assert fewer < {row["pmid"] for row in questions}


def test_the_words_of_a_question_do_not_tell_its_answer() -> None:
    random = Random(0)
    rows = []
    for number in range(3000):
        answer = "no" if random.random() < 0.15 else "yes"
        often = random.random() < (0.8 if answer == "no" else 0.3)
        question = f"Does drug {number} {'affect' if often else 'reduce'} pain?"
        rows.append({"pmid": str(number), "QUESTION": question, "final_decision": answer})

    def share(questions: list[dict], answer: str) -> float:
        return np.mean(["affect" in row["QUESTION"] for row in questions if row["final_decision"] == answer])

    kept = select(rows, yes_per_no=1)
    assert len(kept) > 700 and abs(share(kept, "no") - share(kept, "yes")) < 0.05
    assert share(rows, "no") - share(rows, "yes") > 0.4


def test_the_context_ends_before_the_conclusion_and_the_input_keeps_its_end(corpus: Path, tmp_path: Path) -> None:
    question = build(corpus, tmp_path / "out")[0][0]
    recorded = f"Outcome {question['pmid']} was recorded."
    assert question["CONTEXTS"] == [f"{FILLER} {recorded}"] and question["LONG_ANSWER"] == "It ended."
    assert question["text"] == input_text(question, 90)
    assert input_text(question, 4) == f"{question['QUESTION']}\n{recorded}"


def test_the_harness_reads_the_questions(corpus: Path, tmp_path: Path) -> None:
    questions, _ = build(corpus, tmp_path / "out")
    (task,) = pubmedqa_task(tmp_path / "out/questions.jsonl")["tasks"].values()
    documents = list(task.test_docs())
    assert [document["QUESTION"] for document in documents] == [row["QUESTION"] for row in questions]


def test_bad_input_is_one_clear_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="empty: no files train/"):
        build_pubmedqa_artificial(
            ArtificialQuestionsOptions(corpus=tmp_path / "empty", held_out=[], output=tmp_path / "out")
        )
    with pytest.raises(UserError, match="missing: no such folder"):
        build_pubmedqa_artificial(
            ArtificialQuestionsOptions(corpus=tmp_path / "missing", held_out=[], output=tmp_path / "out")
        )
    (tmp_path / "empty/train/bad.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match="bad.parquet: not a Parquet file of a corpus"):
        build_pubmedqa_artificial(
            ArtificialQuestionsOptions(corpus=tmp_path / "empty", held_out=[], output=tmp_path / "out")
        )
    pq.write_table(pa.Table.from_pylist(ABSTRACTS[35:36], DOCUMENT_SCHEMA), tmp_path / "empty/train/bad.parquet")
    with pytest.raises(UserError, match="no statement in title or conclusion of 1 abstracts"):
        build_pubmedqa_artificial(
            ArtificialQuestionsOptions(corpus=tmp_path / "empty", held_out=[], output=tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ("", "no questions in this file"),
        ('{"id": 1}', "row 1: not a question of PubMedQA: pmid is None, but must be a number"),
        (json.dumps(EXPERT | {"pmid": "abc"}), "pmid is 'abc', but must be a number"),
        (json.dumps(EXPERT | {"QUESTION": 1}), "QUESTION is 1, but must be text"),
        (json.dumps(EXPERT | {"CONTEXTS": SHARED}), "CONTEXTS is 'Thirteen words .*, but must be a list of texts"),
        (json.dumps(EXPERT | {"CONTEXTS": [None]}), r"CONTEXTS is \[None\], but must be a list of texts"),
        (json.dumps(EXPERT | {"LONG_ANSWER": ["It does."]}), "LONG_ANSWER is .*, but must be text or missing"),
        (
            json.dumps(EXPERT | {"final_decision": "perhaps"}),
            "final_decision is 'perhaps', but must be yes, no or maybe",
        ),
    ],
)
def test_a_file_that_is_not_pubmedqa_is_refused(rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(rows)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "questions.jsonl")
