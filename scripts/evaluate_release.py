"""Run every evaluation in the model card, as `healthslm evaluate-release` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("evaluate-release")
