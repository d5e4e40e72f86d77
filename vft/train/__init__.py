"""Training of the tokenizer and the generator: procedural data, losses and the loop."""
