"""``replace_mha`` and back; torch's encoder, and padding on its way through it."""
