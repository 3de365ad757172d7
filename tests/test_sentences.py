"""Where sentences of biomedical English end."""

import pytest

from healthslm.sentences import sentence_end, sentences


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("One of 0.05 mg, e.g. in mice. Two.", "One of 0.05 mg, e.g. in mice."),
        ("(One.) Two.", "(One.)"),
        ('He said "no." We went.', 'He said "no."'),
        ("Was it? [It was.]", "Was it?"),
        ("No end", "No end"),
        ("An end.\n", "An end."),
    ],
)
def test_sentences_end_before_a_capital_letter(text, end):
    assert text[: sentence_end(text)] == end


def test_sentences_part_a_text_without_loss():
    assert sentences("BACKGROUND: Is it 0.5 mg? It is. METHODS: We asked E. coli (n=3). They said no.") == [
        "BACKGROUND: Is it 0.5 mg?",
        "It is.",
        "METHODS: We asked E. coli (n=3).",
        "They said no.",
    ]
    assert sentences("") == sentences("  ") == []
