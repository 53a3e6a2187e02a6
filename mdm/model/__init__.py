"""The diffusion decoder."""
