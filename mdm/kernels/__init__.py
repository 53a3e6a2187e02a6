"""Scans: torch reference and fused CUDA kernels, same signatures."""
