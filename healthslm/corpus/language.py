"""Whether a text is English, which PubMed does not say: its field `language` is the article's, and the abstracts of
articles in other languages are nearly always English."""

from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# English words that stand in every text and are no frequent words of another language in Latin script.
_FUNCTION_WORDS = {
    *("the", "of", "and", "to", "with", "for", "was", "were", "by", "from", "that", "this", "is", "are", "as", "at"),
    *("be", "or", "which", "not", "have", "has", "been", "these", "than", "it"),
}
_CLEARLY_ENGLISH = 0.1  # of the words; abstracts have 0.25, and 1 in 1,000 English ones has less than this
_FEWEST_LETTERS = 150
_CERTAIN = 0.99
# English and its pidgin; Latin, which lists of species and of muscles are; and zxx, which is no language at all.
_NOT_FOREIGN = ("en", "pcm", "la", "zxx")
_SAMPLE_LENGTH = 1000  # characters


def is_english(text: str) -> bool:
    """True unless the text is surely in another language at its beginning or three quarters of the way through.

    The second place finds abstracts that a translation follows, and spares articles that end in a list of names.

    Function words settle nearly all texts. The others are given to py3langid, a fork of langid.py (Lui and Baldwin
    2012, "langid.py: An Off-the-shelf Language Identification Tool"). In doubt, where there are but a few words, a list
    of genes or a table of numbers, the answer is True.
    """
    samples = [text[start : start + _SAMPLE_LENGTH] for start in (0, 3 * len(text) // 4)]
    return not any(_is_foreign(sample) for sample in samples)


def _is_foreign(sample: str) -> bool:
    words = sample.lower().split()
    if sum(word in _FUNCTION_WORDS for word in words) >= _CLEARLY_ENGLISH * len(words):
        return False
    if sum(map(str.isalpha, sample)) < _FEWEST_LETTERS:
        return False
    probabilities = dict(_identifier().rank(sample))
    return 1 - sum(probabilities[language] for language in _NOT_FOREIGN) >= _CERTAIN


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
