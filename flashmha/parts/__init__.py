"""What a layer may be given: objects that work on heads."""
