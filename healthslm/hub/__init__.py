"""Publishing on the Hugging Face Hub: the model repository and the other forms of its weights."""
