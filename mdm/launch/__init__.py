"""Processes of a job: starting, supervising and ending them, on one node or many."""
