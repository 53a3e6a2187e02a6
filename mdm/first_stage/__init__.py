"""The tokenizer and the autoencoder: load them, train them, identify them by their hashes."""
