"""Classifiers of mentions, sentences and texts, by Transformers' Trainer."""
