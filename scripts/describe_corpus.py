"""Write the data card of a corpus, as `healthslm describe-corpus` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("describe-corpus")
