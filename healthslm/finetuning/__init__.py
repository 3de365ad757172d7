"""Fine-tuning: adapters and whole models from examples, by TRL, PEFT and Transformers' Trainer."""
