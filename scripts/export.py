"""Export a model to stock Llama, GGUF or ONNX, as `healthslm export` does."""

from healthslm.cli import main

if __name__ == "__main__":
    main("export")
