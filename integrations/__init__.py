"""Placeholder, see package modules."""
