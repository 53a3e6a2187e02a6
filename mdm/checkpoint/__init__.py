"""Committed, sharded checkpoints: save them, read them on any number of ranks, export them."""
