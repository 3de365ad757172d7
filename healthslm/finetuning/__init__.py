"""Fine-tuning: adapters by TRL and PEFT, and classifiers."""
