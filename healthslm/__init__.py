"""HealthSLM: small language models for biomedical text, from PubMed files to generated text."""

__version__ = "0.1.0"
