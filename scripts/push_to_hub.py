"""Publish the model and its other forms on the Hugging Face Hub, as `healthslm push-to-hub` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("push-to-hub")
