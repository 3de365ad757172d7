"""Download PubMed's files, as `healthslm download-pubmed` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("download-pubmed")
