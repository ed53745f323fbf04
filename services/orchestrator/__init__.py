"""Specs, plans and runs."""
