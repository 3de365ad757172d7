"""Detecting texts that are not English.

PubMed's field `language` is no help: it is the article's language, and abstracts of articles in other languages are
nearly always English.
"""

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# Words found in every English text that are not frequent in another language written in Latin script.
_FUNCTION_WORDS = {
    *("the", "of", "and", "to", "with", "for", "was", "were", "by", "from", "that", "this", "is", "are", "as", "at"),
    *("be", "or", "which", "not", "have", "has", "been", "these", "than", "it"),
}
_MIN_FUNCTION_WORDS = 0.1  # share of the words; abstracts have 0.25, and 1 in 1,000 English ones has less than this
_MIN_LETTERS = 150
_MIN_PROBABILITY = 0.99
# English and Nigerian Pidgin, Latin (lists of species or muscles), and zxx (no linguistic content).
_NOT_FOREIGN = ("en", "pcm", "la", "zxx")
_SAMPLE_LENGTH = 1000  # characters


def is_english(text: str) -> bool:
    """Whether a text is English: False only if it is clearly in another language.

    Two samples are checked, at the beginning and three quarters into the text. The second finds abstracts followed by a
    translation, and skips the list of names with which an article may end.

    Function words decide nearly all texts. py3langid decides the others; it is a fork of langid.py (Lui and Baldwin,
    "langid.py: An Off-the-shelf Language Identification Tool", 2012). Texts in doubt (a few words, a list of genes, a
    table of numbers) count as English.
    """
    samples = [text[start : start + _SAMPLE_LENGTH] for start in (0, 3 * len(text) // 4)]
    return not any(_is_foreign(sample) for sample in samples)


def _is_foreign(sample: str) -> bool:
    words = sample.lower().split()
    if sum(word in _FUNCTION_WORDS for word in words) >= _MIN_FUNCTION_WORDS * len(words):
        return False
    if sum(map(str.isalpha, sample)) < _MIN_LETTERS:
        return False
    probabilities = dict(_identifier().rank(sample))
    return 1 - sum(probabilities[language] for language in _NOT_FOREIGN) >= _MIN_PROBABILITY


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
