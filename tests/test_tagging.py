"""BIO data: reading, the tokens of words, and mentions, compared with seqeval and hand-made cases."""

import random
from pathlib import Path

import numpy as np
import pytest
from paths import REPOSITORY
from scipy.stats import bootstrap
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.metrics import f1_score as label_f1
from tiny_models import byte_tokenizer
from transformers import AutoTokenizer

from healthslm.classification.baselines import majority, tag_with_dictionary, tfidf_regression
from healthslm.classification.labeled_data import Example, read_examples
from healthslm.classification.metrics import label_scores, mention_scores
from healthslm.classification.options import ClassifierOptions
from healthslm.classification.tagging import IGNORED, label_tokens, mentions, running_text, trim_offsets
from healthslm.errors import UserError

SENTENCES = """\
-DOCSTART-\tO

Lithium\tB-Chemical
caused\tO
bipolar\tB-Disease
disorder\tI-Disease
.\tO

Sleep NN O
apnea NN B-Disease
"""


def read(path: Path, text: str, **options) -> list[Example]:
    path.write_text(text, encoding="utf-8")
    return read_examples([path], ClassifierOptions(train=[path], output=path, **options))


def test_conll_files_have_the_word_first_and_the_tag_last(tmp_path):
    first, second = read(tmp_path / "train.tsv", SENTENCES)
    assert first.units == ("Lithium", "caused", "bipolar", "disorder", ".")
    assert first.labels == ("B-Chemical", "O", "B-Disease", "I-Disease", "O")
    assert (second.units, second.labels) == (("Sleep", "apnea"), ("O", "B-Disease"))
    assert second.place == f"{tmp_path / 'train.tsv'}, line 9"


def test_an_i_tag_that_continues_nothing_begins_a_mention(tmp_path, caplog):
    first, second = read(tmp_path / "train.tsv", "a\tI-X\nb\tI-X\nc\tI-Y\nd\tO\n\ne\tB-X\nf\tI-Y\n")
    assert (first.labels, second.labels) == (("B-X", "I-X", "B-Y", "O"), ("B-X", "B-Y"))
    assert "train.tsv, line 1: an I- tag continues no mention and is read as B- (in 2 sentences)" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "options", "problem"),
    [
        ("a.tsv", "", {}, "a.tsv: no examples in this file"),
        ("a.tsv", "word\tO\nalone\n", {}, "a.tsv, line 2: 'alone' is not a word and its tag"),
        ("a.tsv", "word\tS-Disease\n", {}, "a.tsv, line 1: tag 'S-Disease' is not O, B-TYPE or I-TYPE"),
        (
            "a.tsv",
            "word\tO\n",
            {"text_field": "words"},
            "text_field: CoNLL files (.tsv, .conll, .bio, .txt) have columns",
        ),
        ("a.tsv", "word\tO\n", {"rank": 4}, "rank: needs --method lora"),
        ("a.tsv", "word\tO\n", {"task": "text"}, "a.tsv: --task text reads JSON Lines or Parquet, not .tsv"),
        ("a.jsonl", '{"text": "one"}', {"task": "text"}, "a.jsonl, line 1: no field 'label' (it has text)"),
        ("a.jsonl", '{"text": 1, "label": 2}', {"task": "text"}, "a.jsonl, line 1: 'text' must be text"),
        ("a.jsonl", '{"text": "one", "label": null}', {"task": "text"}, "a.jsonl, line 1: 'label' must be text"),
        ("a.jsonl", '{"tokens": ["a"], "labels": []}', {}, "a.jsonl, line 1: 1 tokens but 0 labels"),
        ("a.jsonl", "{", {}, "a.jsonl, line 1: not JSON"),
        ("a.parquet", "x", {}, "a.parquet: not a Parquet file"),
    ],
)
def test_wrong_files_are_named_with_the_line(name, text, options, problem, tmp_path):
    with pytest.raises(UserError) as raised:
        read(tmp_path / name, text, **options)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("L - dopa ( 3 . 5 mg ) .", "L-dopa (3.5 mg)."),
        ("Parkinson ' s disease", "Parkinson's disease"),
        ("10 , 000 of 20 , mostly men", "10,000 of 20, mostly men"),
        ("[ Tay - Sachs ] : A / B", "[Tay-Sachs]: A/B"),
    ],
)
def test_words_join_to_running_text(words, text):
    assert "".join(running_text(words.split())) == text


OWNERS = [None, 0, 0, 0, 1, 2, 2, None]
BEGIN, INSIDE, OUTSIDE = 1, 2, 0


def test_all_tokens_of_a_word_can_have_its_label():
    labels, places = label_tokens(OWNERS, [BEGIN, INSIDE, OUTSIDE], [OUTSIDE, INSIDE, INSIDE], "all")
    assert labels == [IGNORED, BEGIN, INSIDE, INSIDE, INSIDE, OUTSIDE, OUTSIDE, IGNORED]
    assert places == [1, 4, 5]


def test_only_the_last_token_of_a_word_can_have_its_label():
    labels, places = label_tokens(OWNERS, [BEGIN, INSIDE, OUTSIDE], [OUTSIDE, INSIDE, INSIDE], "last")
    assert labels == [IGNORED, IGNORED, IGNORED, BEGIN, INSIDE, IGNORED, OUTSIDE, IGNORED]
    assert places == [3, 4, 6]


def test_words_that_are_cut_off_have_no_place():
    _, places = label_tokens(OWNERS[:5], [BEGIN, INSIDE, OUTSIDE], [OUTSIDE, INSIDE, INSIDE], "all")
    assert places == [1, 4]


def test_offsets_leave_out_the_space_before_a_word_and_the_tokens_stay():
    text = "Lithium caused (severe) tremor."
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY, trust_remote_code=True)
    before = tokenizer(text)["input_ids"]
    trim_offsets(tokenizer)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == before
    assert all(text[start:end] == text[start:end].strip() for start, end in encoded["offset_mapping"])
    assert byte_tokenizer()("a b", return_offsets_mapping=True)["offset_mapping"][2] == (1, 2)


def test_mentions_are_those_of_iob2():
    tags = ["B-X", "I-X", "I-Y", "O", "I-X", "B-Y", "B-Y", "I-Y"]
    assert mentions(tags) == {(0, 2, "X"), (5, 6, "Y"), (6, 8, "Y")}


EXPECTED = [["B-X", "I-X", "O"], ["O", "B-Y"], ["B-X", "B-X"], ["O", "O"]]
PREDICTED = [["B-X", "O", "B-Y"], ["O", "B-Y"], ["B-X", "I-X"], ["I-Y", "O"]]


def test_mention_scores_equal_those_of_seqeval():
    found = mention_scores(EXPECTED, PREDICTED, resamples=200)
    assert found["f1"] == pytest.approx(f1_score(EXPECTED, PREDICTED, mode="strict", scheme=IOB2))
    assert (found["mentions"], found["precision"], found["recall"]) == (4, 1 / 4, 1 / 4)
    assert found["by_type"]["Y"]["f1"] == pytest.approx(2 / 3)
    assert found["interval"][0] <= found["f1"] <= found["interval"][1]
    assert mention_scores(EXPECTED, EXPECTED, resamples=200)["f1"] == 1


def test_a_mention_that_many_resamples_lack_has_no_interval():
    found = mention_scores([["B-Drug"], *[["O"]] * 3], [["O"]] * 4, resamples=200)
    assert found["f1"] == 0 and found["interval"] is None


def test_label_scores_equal_those_of_scikit_learn():
    expected, predicted = [["a", "b", "c"], ["a", "a"], ["b"]], [["a", "c", "c"], ["a", "b"], ["b"]]
    flat = [[label for labels in group for label in labels] for group in (expected, predicted)]
    found = label_scores(expected, predicted, resamples=200)
    assert found["macro_f1"] == pytest.approx(label_f1(*flat, average="macro"))
    assert found["accuracy"] == accuracy_score(*flat)
    assert found["confusion"] == confusion_matrix(*flat).tolist()
    assert found["interval"][0] < found["macro_f1"] < found["interval"][1]


def correlated_labels(documents: int) -> tuple[list[list[str]], list[list[str]]]:
    """Labels of documents, some with many mistakes and some with few, so that drawing labels would differ from drawing
    documents."""
    choose = random.Random(0)
    expected = [choose.choices(["B-X", "B-Y", "O"], k=choose.randint(1, 12)) for _ in range(documents)]
    predicted = []
    for labels in expected:
        mistakes = choose.choice([0.0, 0.8])
        predicted.append([choose.choice(["B-X", "B-Y", "O"]) if choose.random() < mistakes else x for x in labels])
    return expected, predicted


def test_intervals_are_those_of_scipys_bootstrap_over_documents():
    expected, predicted = (list(map(np.array, labels)) for labels in correlated_labels(documents=40))

    def macro_f1(drawn: np.ndarray) -> float:
        flat = (np.concatenate([labels[number] for number in drawn]) for labels in (expected, predicted))
        return label_f1(*flat, average="macro")

    def f1(drawn: np.ndarray) -> float:
        """Every label but O is a mention of one word."""
        correct = sum(((expected[number] == predicted[number]) & (expected[number] != "O")).sum() for number in drawn)
        return 2 * correct / sum((labels[number] != "O").sum() for number in drawn for labels in (expected, predicted))

    for statistic, scores in ((macro_f1, label_scores), (f1, mention_scores)):
        low, high = bootstrap(
            (np.arange(40),), statistic, vectorized=False, n_resamples=400, method="percentile", rng=0
        ).confidence_interval
        found = scores([labels.tolist() for labels in expected], [labels.tolist() for labels in predicted])
        assert found["interval"] == pytest.approx([low, high], abs=0.15 * (high - low))


def example(text: str, tags: str) -> Example:
    return Example(tuple(text.split()), tuple(tags.split()), "")


def test_the_dictionary_takes_the_longest_match_and_drops_words_that_are_seldom_mentions():
    train = [
        example("renal failure and failure", "B-D I-D O O"),
        example("Renal cell cancer", "B-D I-D I-D"),
        example("cell of renal failure", "O O B-D I-D"),
        example("the cell", "O B-C"),
    ]
    test = [example("RENAL cell cancer in a cell", "O O O O O O"), example("renal failure", "O O")]
    assert tag_with_dictionary(train, test) == [["B-D", "I-D", "I-D", "O", "O", "O"], ["B-D", "I-D"]]


def test_regression_learns_words_and_with_position_also_places():
    train = [example("cats mice food", "a b a")] * 3 + [example("mice cats food", "b a a")] * 2
    assert tfidf_regression(train, [example("mice cats cats", "a a a")]) == [["b", "a", "a"]]
    places = [example("word word word", "a b b")] * 20
    assert majority(places, places[:1]) == tfidf_regression(places, places[:1]) == [["b", "b", "b"]]
    assert tfidf_regression(places, places[:1], with_position=True) == [["a", "b", "b"]]
