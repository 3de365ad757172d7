"""Download PubMed's files: python scripts/download_pubmed.py --output pubmed --files 1-20 (or: all; or: latest 3)"""

from command_line import run
from healthslm.corpus.download import DownloadOptions, download_pubmed

if __name__ == "__main__":
    run(download_pubmed, DownloadOptions)
