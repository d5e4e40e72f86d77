"""Training of the tokenizer: procedural data, losses and loops."""
