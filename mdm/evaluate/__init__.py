"""Measuring what the model generates."""
