"""Compare pre-tokenizer splits for byte-pair encoding, by bytes per token and bits per byte on held-out abstracts.

    python benchmarks/tokenizer_split.py CORPUS HELD_OUT.parquet

The tokenizers differ only in their split and are trained on `--tokenizer-bytes` of the corpus's training split. Bits
per byte are those of a small model trained on the same bytes of text with each split. Its vocabulary is the first
`--model-vocab-size` tokens, so that it does not consist of embeddings only.
"""

import argparse
import itertools
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from healthslm.corpus.reader import read_texts, split_files

SEPARATOR = "<|endoftext|>"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "GPT-2": ByteLevel(add_prefix_space=False),
    "GPT-2, single digits": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "GPT-4 (up to 3 digits)": split_by(rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"),
    "Qwen2 (GPT-4, single digits)": split_by(rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"),
}


def read_files(paths: list[Path]) -> list[str]:
    return [text for path in paths for texts in read_texts(path) for text in texts]


def count_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def take_bytes(texts: list[str], limit: int) -> list[str]:
    """The first texts, until they have `limit` bytes together."""
    before = itertools.accumulate((len(text.encode()) for text in texts), initial=0)
    return [text for text, start in zip(texts, before, strict=False) if start < limit]


def train_tokenizer(split: PreTokenizer, texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = split
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def shrink(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer that training with a smaller vocabulary gives: it has the first merges of the same list."""
    state = json.loads(tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    state["model"]["vocab"] = {token: index for token, index in vocab.items() if index < vocab_size}
    state["model"]["merges"] = merges[: vocab_size - (len(vocab) - len(merges))]
    return Tokenizer.from_str(json.dumps(state))


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Each text's tokens after the separator, id 0."""
    return [[0, *encoding.ids] for encoding in tokenizer.encode_batch_fast(texts)]


def train_model(
    documents: list[list[int]], vocab_size: int, seed: int, sequence_tokens: int = 256, batch_size: int = 4
) -> LlamaForCausalLM:
    """Train for one pass over the documents, packed into sequences."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    stream = torch.tensor(list(itertools.chain.from_iterable(documents)))
    batch_tokens = batch_size * sequence_tokens
    batches = stream[: len(stream) // batch_tokens * batch_tokens].view(-1, batch_size, sequence_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    for batch in tqdm(batches, desc="train", unit="step"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def bits(model: LlamaForCausalLM, documents: list[list[int]]) -> float:
    """Bits of all documents, each by itself after its separator."""
    nats = 0.0
    for ids in tqdm(documents, desc="scoring", unit="document"):
        input_ids = torch.tensor([ids])
        nats += model(input_ids=input_ids, labels=input_ids).loss.item() * (len(ids) - 1)
    return nats / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--tokenizer-bytes", type=int, default=60_000_000)
    parser.add_argument("--model-vocab-size", type=int, default=8_000)
    parser.add_argument("--model-bytes", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's initial weights")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    options = parser.parse_args()

    train_texts = read_files(split_files(options.corpus, "train"))
    random.Random(0).shuffle(train_texts)
    tokenizer_texts = take_bytes(train_texts, options.tokenizer_bytes)
    model_texts = take_bytes(train_texts, options.model_bytes)
    held_out = read_files([options.held_out])
    scored = take_bytes(held_out, 300_000)

    print("| split | bytes per token | bits per byte |\n| --- | ---: | ---: |", flush=True)
    for name in options.splits:
        tokenizer = train_tokenizer(SPLITS[name], tokenizer_texts, options.vocab_size)
        bytes_per_token = count_bytes(held_out) / sum(len(ids) - 1 for ids in encode(tokenizer, held_out))
        small = shrink(tokenizer, options.model_vocab_size)
        model = train_model(encode(small, model_texts), options.model_vocab_size, options.seed)
        bits_per_byte = bits(model, encode(small, scored)) / count_bytes(scored)
        print(f"| {name} | {bytes_per_token:.3f} | {bits_per_byte:.4f} |", flush=True)


if __name__ == "__main__":
    main()
