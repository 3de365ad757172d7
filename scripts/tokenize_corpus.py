"""Tokenize a corpus, as `healthslm tokenize-corpus` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("tokenize-corpus")
