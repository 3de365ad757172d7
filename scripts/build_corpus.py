"""Build the corpus: python scripts/build_corpus.py --pubmed pubmed --sources 'texts/*.parquet' --output corpus"""

from command_line import run
from healthslm.corpus.build import CorpusOptions, build_corpus

if __name__ == "__main__":
    run(build_corpus, CorpusOptions)
