"""The version of freshrec."""

__version__ = "0.1.0"
