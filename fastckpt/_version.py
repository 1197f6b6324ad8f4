"""The version of the package; the format has a number of its own."""

__version__ = "0.1.0"
