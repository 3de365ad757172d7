"""Fine-tune a classifier, as `healthslm finetune-classifier` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("finetune-classifier")
