"""Build the corpus, as `healthslm build-corpus` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("build-corpus")
