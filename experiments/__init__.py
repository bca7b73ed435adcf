"""Controlled comparisons: the command line, configs, reports, and the embedded miniworld."""
