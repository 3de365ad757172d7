"""Write the data card of a corpus: python scripts/describe_corpus.py --corpus corpus --tokens tokens --output card"""

from command_line import run
from healthslm.data_card.describe import DataCardOptions, describe_corpus

if __name__ == "__main__":
    run(describe_corpus, DataCardOptions)
