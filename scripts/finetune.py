"""Fine-tune a language model on examples, as `healthslm finetune` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("finetune")
