"""The flash-attn packages, one version a file."""
