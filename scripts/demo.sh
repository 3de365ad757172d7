#!/usr/bin/env bash
# Run every stage on the sample in sample/pubmed, without a network: scripts/demo.sh build/demo
# The same commands work on real PubMed files, with the recipe configs/healthslm-15m.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder to write to}

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$(realpath -m "$out")/huggingface"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more threads slow down so small a model

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

The generated text is gibberish, as expected: a model of this size, trained on sixty made-up citations, learns what an
abstract looks like, not what is true. Nothing that a model of this project generates is medical advice.

Files in $out:
  records/    the citations, one Parquet file per XML file
  signatures/ the reasons to drop a citation, and the keys that find duplicates
  corpus/     the training documents, and report.json: what was read, kept and dropped, and why
  tokenizer/  a byte-level BPE of 1,000 tokens
  tokens/     the documents as arrays of tokens
  run/        config.yaml, metrics.jsonl, checkpoints/, and best/, the model:

  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("$out/run/best", trust_remote_code=True)
  tokenizer = AutoTokenizer.from_pretrained("$out/run/best", trust_remote_code=True)

To train on real files, download some with scripts/download_pubmed.py --output pubmed --files latest 3, then run the
commands above with --pubmed pubmed, --vocab-size 32000 and --recipe configs/healthslm-15m.yaml.
docs/pipeline.md explains every stage.
END
