"""From exported weights to pictures and text."""

from mdm.generate.generator import Generator

__all__ = ["Generator"]
