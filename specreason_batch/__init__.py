"""Batched SpecReason (arXiv 2504.07891) over two offline engines, at data-set scale."""

__version__ = "0.1.0"
