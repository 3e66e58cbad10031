"""METRO in other programs."""
