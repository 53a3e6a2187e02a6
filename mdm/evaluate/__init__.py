"""Metrics and suites that score generated images and texts: numbers only."""
