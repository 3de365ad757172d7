#!/usr/bin/env bash
# The whole path on the sample in sample/pubmed, without a network: scripts/demo.sh build/demo
# Real PubMed files take the same commands, with configs/healthslm-15m.yaml for the recipe.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder to write to}

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$(realpath -m "$out")/huggingface"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more threads slow so small a network down

step() {
    printf '\n$ %s\n' "$(printf '%q ' "$@")"
    "$@"
}

rm -rf "$out"
step python scripts/build_corpus.py --pubmed sample/pubmed --output "$out/corpus" --validation-fraction 0.1 --test-fraction 0.1
step python scripts/train_tokenizer.py --corpus "$out/corpus" --output "$out/tokenizer" --vocab-size 1000
step python scripts/tokenize_corpus.py --corpus "$out/corpus" --tokenizer "$out/tokenizer" --output "$out/tokens"
step python scripts/pretrain.py --recipe configs/demo.yaml --tokens "$out/tokens" --output "$out/run"
step python scripts/evaluate.py --model "$out/run/best" --data "$out/corpus/test"
step python scripts/generate.py --model "$out/run/best" --prompt "Effect of vitamin D" --max-new-tokens 60

cat <<END

That was gibberish, and it should be: a network of this size that has read sixty made-up citations has learnt how an
abstract looks, not what is true. Nothing that a model of this project writes is medical advice.

What lies in $out:
  records/    the citations, one Parquet file for each XML file
  signatures/ what is wrong with each of them, and keys by which copies are found
  corpus/     the documents to train on, and report.json: what was read, kept and dropped, and why
  tokenizer/  a byte-level BPE of 1,000 tokens
  tokens/     the documents as arrays of tokens
  run/        config.yaml, metrics.jsonl, checkpoints/, and best/, the model:

  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("$out/run/best", trust_remote_code=True)
  tokenizer = AutoTokenizer.from_pretrained("$out/run/best", trust_remote_code=True)

The same on real files: get some by scripts/download_pubmed.py --output pubmed --files latest 3, then run the commands
above with --pubmed pubmed, --vocab-size 32000 and --recipe configs/healthslm-15m.yaml.
docs/pipeline.md explains every stage.
END
