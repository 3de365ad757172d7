"""Train and evaluate on PubMedQA's expert questions by cross-validation, as `healthslm cross-validate-pubmedqa` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("cross-validate-pubmedqa")
