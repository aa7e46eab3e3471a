"""Attention over the paged cache: settings, cache, page selection, attend functions."""
