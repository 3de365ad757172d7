"""What a model is worth, measured by definitions that hold for every model."""
