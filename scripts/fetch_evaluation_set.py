"""Download the held-out documents from NCBI, as `healthslm fetch-evaluation-set` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("fetch-evaluation-set")
