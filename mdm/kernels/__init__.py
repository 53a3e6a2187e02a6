"""The SSD scan and the short convolution: torch references and fused CUDA kernels."""
