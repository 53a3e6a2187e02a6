"""Multi-Modal Diffusion Mamba: one Mamba-2 diffusion decoder for images and text."""
