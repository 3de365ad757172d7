"""Train a tokenizer on a corpus: python scripts/train_tokenizer.py --corpus corpus --output tokenizer"""

from command_line import run
from healthslm.tokenization.tokenizer import TokenizerOptions, train_tokenizer

if __name__ == "__main__":
    run(train_tokenizer, TokenizerOptions)
