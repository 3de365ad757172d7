"""Pretraining: from tokens to weights."""
