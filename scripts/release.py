"""Release the model of a run, as `healthslm release` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("release")
