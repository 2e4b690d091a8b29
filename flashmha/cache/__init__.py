"""Caches of keys and values, which stay outside the layers."""
