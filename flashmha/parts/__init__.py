"""What a layer may be given: norms of heads, rotary positions, biases by position."""
