"""The data card: what a corpus holds, in documents, bytes and tokens."""
