"""English is distinguished from the languages that NCBI itself marks; texts in doubt count as English."""

import gzip
import json

import pyarrow.parquet as pq
import pytest
from lxml import etree

from healthslm.corpus.language import is_english
from healthslm.corpus.markup import inner_text

# The same statement in languages of PubMed's abstracts.
FOREIGN = {
    "Spanish": "El objetivo del estudio fue determinar la prevalencia de la hipertensión arterial en adultos mayores. "
    "Se incluyeron todos los pacientes que acudieron a la consulta durante un año y se midió la presión dos veces.",
    "German": "Ziel der Untersuchung war es, die Häufigkeit des Bluthochdrucks bei älteren Menschen zu bestimmen. "
    "Alle Patienten, die im Laufe eines Jahres in die Sprechstunde kamen, wurden zweimal gemessen und befragt.",
    "French": "L'objectif de cette étude était de déterminer la fréquence de l'hypertension artérielle chez les "
    "personnes âgées. Tous les patients venus en consultation pendant une année ont été mesurés deux fois.",
    "Russian": "Цель исследования состояла в том, чтобы определить распространённость артериальной гипертонии у "
    "пожилых людей. Всем пациентам, обратившимся в течение года, артериальное давление измеряли два раза.",
    "Chinese": "本研究的目的是确定老年人高血压的患病率。我们纳入了一年内就诊的所有患者，并对其血压进行了两次测量。" * 5,
}
IN_DOUBT = [
    "",
    "Résumé.",
    "TP53 BRCA1 BRCA2 EGFR KRAS MYC PTEN RB1 CDKN2A VHL APC MLH1 MSH2 MSH6 PMS2 ATM CHEK2 PALB2 " * 5,
    "ATGGCGTACGTTAGCATCGATCGATTACGATCGATCGATCGTAGCTAGCTAGCATCGATCG " * 10,
    "Age 45 (12) 46 (13) 0.45\nMale 23 24 0.98\nBMI 27.4 28.1 0.22\nLDL 3.2 3.1 0.4\n" * 10,
    "Escherichia coli, Staphylococcus aureus, Pseudomonas aeruginosa, Klebsiella pneumoniae, Candida albicans, " * 5,
    "Musculus biceps brachii, nervus radialis, arteria brachialis, vena cephalica, musculus deltoideus, " * 5,
    "Humans; Male; Female; Adult; Diabetes Mellitus, Type 2/drug therapy; Blood Glucose/analysis; Risk Factors; " * 5,
    "Smith J, Müller K, García-López M, Dubois P, Rossi G, Silva A, Nguyen T, Kowalski P, Jansen H. " * 5,
    "SERUM POTASSIUM LEVELS, HYPERTENSIVE RATS, INSULIN THERAPY, DIABETES MELLITUS, WEIGHT LOSS, BLOOD PRESSURE, " * 5,
    "metformin 500 mg bid, lisinopril 10 mg qd, atorvastatin 40 mg qhs, aspirin 81 mg qd, prn albuterol inhaler, " * 5,
]
ENGLISH = (
    "We measured the blood pressure of all patients who were seen within a year, and asked them about their health. "
)


def other_abstracts(path) -> list[tuple[str, str]]:
    """The abstracts that NCBI gives in addition to the English one, with their languages."""
    with gzip.open(path) as file:
        found = []
        for _, element in etree.iterparse(file, tag="OtherAbstract"):
            text = " ".join(inner_text(section) for section in element.findall("AbstractText"))
            found.append((element.get("Language"), text))
            element.clear()
    return found


@pytest.mark.parametrize("language", FOREIGN)
def test_other_languages_are_not_english(language):
    assert not is_english(FOREIGN[language])


@pytest.mark.parametrize("text", IN_DOUBT)
def test_text_that_is_not_prose_counts_as_english(text):
    assert is_english(text)


def test_a_text_that_continues_in_another_language_is_not_english():
    assert is_english(ENGLISH * 10)
    assert not is_english(ENGLISH * 10 + FOREIGN["Spanish"] * 5)
    assert not is_english(FOREIGN["Spanish"] * 5 + ENGLISH * 10)


def test_capitals_and_foreign_names_do_not_matter():
    assert is_english(ENGLISH.upper() * 3)
    assert is_english(
        "Sjögren and Behçet were cited by Müller, Łukasz, Nuñez and Françoise of the Università di Bologna. " * 3
    )


@pytest.mark.slow
def test_abstracts_that_ncbi_marks_as_another_language_are_not_english(test_data):
    foreign = [
        text
        for path in sorted((test_data / "pubmed/baseline").glob("*.xml.gz"))
        for language, text in other_abstracts(path)
        if language != "eng" and text != "Abstract available from the publisher."
    ]
    assert len(foreign) > 40
    assert [text for text in foreign if is_english(text)] == []


def test_abstracts_and_dialogues_known_to_be_english_are_english(test_data):
    with (test_data / "pubmedqa/test.jsonl").open(encoding="utf-8") as file:
        abstracts = ["\n".join(json.loads(line)["CONTEXTS"]) for line in file]
    dialogues = pq.read_table(test_data / "corpus/train-clinical-00.parquet", columns=["text"])["text"].to_pylist()
    assert len(abstracts) == 500 and len(dialogues) > 1000
    assert [text for text in abstracts + dialogues if not is_english(text)] == []
