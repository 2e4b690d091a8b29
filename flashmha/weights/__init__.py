"""Attention weights beside the output of a fused kernel."""
