"""Emoji with their names: a data set for one GPU."""
