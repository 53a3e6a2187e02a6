"""Encoded data: schema, storage, order, loading."""
