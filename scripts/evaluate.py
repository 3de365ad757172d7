"""Compute a model's bits per byte on held-out text, as `healthslm evaluate` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("evaluate")
