"""Other forms of a model, for programs that don't know its code: stock Llama, GGUF and ONNX."""
