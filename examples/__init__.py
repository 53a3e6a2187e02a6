"""Whole projects built on mdm: each trains and judges a model from published data."""
