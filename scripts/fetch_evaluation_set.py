"""Download the held-out PubMed citations: python scripts/fetch_evaluation_set.py --ids FILE.json --output held-out"""

from command_line import run
from healthslm.evaluation.evaluation_set import FetchOptions, fetch_evaluation_set

if __name__ == "__main__":
    run(fetch_evaluation_set, FetchOptions)
