"""Train and evaluate on PubMedQA by cross-validation, as `healthslm cross-validate-pubmedqa` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("cross-validate-pubmedqa")
