"""Fast equivalents of the literal layers, tested equal to them."""
