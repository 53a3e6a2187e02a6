"""Images and text from exported weights."""

from mdm.generate.generator import Generator

__all__ = ["Generator"]
