"""Tokenize a corpus: python scripts/tokenize_corpus.py --corpus corpus --tokenizer tokenizer --output tokens"""

from command_line import run
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus

if __name__ == "__main__":
    run(tokenize_corpus, TokenizeOptions)
