"""Train a tokenizer on a corpus, as `healthslm train-tokenizer` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("train-tokenizer")
