"""Generate text with a model, as `healthslm generate` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("generate")
