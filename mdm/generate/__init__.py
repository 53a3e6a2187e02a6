"""From weights to pictures and text."""
