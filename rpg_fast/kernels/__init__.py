"""Triton kernels, one file a stage. This package imports no Triton: its files do, when a launcher is wanted."""
