"""Triton kernels of :mod:`metro.ops`, whose operations import them when one is first used."""
