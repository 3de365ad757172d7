"""Compare tokenizers: python scripts/evaluate_tokenizer.py --tokenizers tokenizer gpt2 --data corpus/validation"""

from command_line import run
from healthslm.tokenization.tokenizer_report import TokenizerReportOptions, report_tokenizers

if __name__ == "__main__":
    run(report_tokenizers, TokenizerReportOptions)
