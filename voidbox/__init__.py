"""Composable agent runtime with enforced isolation."""

__version__ = "0.1.0"
