"""``FlashMultiHeadAttention`` and its one forward."""
