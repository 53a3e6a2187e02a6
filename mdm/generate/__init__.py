"""From exported weights to images and text."""

from mdm.generate.generator import Generator

__all__ = ["Generator"]
