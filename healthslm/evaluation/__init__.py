"""Evaluation of language models on biomedical text."""
