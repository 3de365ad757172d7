"""Fine-tuning: language models by TRL and PEFT, and classifiers by Transformers' Trainer."""
