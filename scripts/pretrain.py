"""Train a model, as `healthslm pretrain` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("pretrain")
