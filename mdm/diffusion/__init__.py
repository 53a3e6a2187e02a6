"""Noise schedules, score entropy, solvers and keyed noise."""
