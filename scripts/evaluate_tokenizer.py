"""Compare tokenizers, as `healthslm evaluate-tokenizer` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("evaluate-tokenizer")
