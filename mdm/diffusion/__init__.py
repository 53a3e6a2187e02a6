"""Noise schedules, score entropy, samplers."""
