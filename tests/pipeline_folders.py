"""The stages before training, run once on the embedded sample, for tests of training and later stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paths import SAMPLE

from healthslm.corpus.build import CorpusOptions, build_corpus
from healthslm.tokenization.tokenize import TokenizeOptions, tokenize_corpus
from healthslm.tokenization.tokenizer import TokenizerOptions, train_tokenizer

TINY_MODEL = {
    "model_type": "healthslm",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
TINY_GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Folders:
    corpus: Path
    tokenizer: Path
    tokens: Path


def make_folders(root: Path, held_out: Sequence[Path] = ()) -> Folders:
    folders = Folders(root / "corpus", root / "tokenizer", root / "tokens")
    build_corpus(
        CorpusOptions(
            output=folders.corpus,
            pubmed=SAMPLE,
            held_out=list(held_out),
            validation_fraction=0.1,
            test_fraction=0.1,
            workers=1,
        )
    )
    train_tokenizer(TokenizerOptions(corpus=folders.corpus, output=folders.tokenizer, vocab_size=512))
    tokenize_corpus(
        TokenizeOptions(corpus=folders.corpus, tokenizer=str(folders.tokenizer), output=folders.tokens, workers=1)
    )
    return folders
