"""From texts to arrays of tokens, and the tokenizer."""
