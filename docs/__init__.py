"""The documentation: its pages, and the Sphinx extensions that generate the rest of them."""
