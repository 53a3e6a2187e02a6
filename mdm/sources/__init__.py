"""Published data set layouts, read as they lie."""
