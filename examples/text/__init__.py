"""`make learn-text`: English from packages, and how well the diffusion models it."""
