"""Make artificial training questions for PubMedQA, as `healthslm build-pubmedqa-artificial` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("build-pubmedqa-artificial")
