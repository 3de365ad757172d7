"""From arrays of tokens to weights."""
