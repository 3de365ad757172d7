"""Compare a model in fp32, bf16, int8, nf4 and int4, or save it in one of them, as `healthslm quantize` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("quantize")
