"""Downloading PubMed and building a clean corpus of training, validation and test documents."""
