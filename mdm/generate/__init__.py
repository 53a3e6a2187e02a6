"""From exported weights to pictures and text."""

from mdm.generate.generator import MDM

__all__ = ["MDM"]
