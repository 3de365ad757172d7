"""Fine-tuning of language models on examples, by TRL and PEFT."""
