"""HealthSLM: small language models for biomedical text, from PubMed files to generated text."""

__version__ = "0.2.0"
