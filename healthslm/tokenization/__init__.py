"""Training and comparing tokenizers, and turning a corpus into arrays of tokens."""
