"""Models that the kit draws: encoders, transformers and trees of layers."""
