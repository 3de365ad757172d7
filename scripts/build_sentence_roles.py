"""Build a dataset of sentences and their roles, as `healthslm build-sentence-roles` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("build-sentence-roles")
