"""Parts that a layer may be given."""
