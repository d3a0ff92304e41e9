"""What sparse attention costs on a given language model: the same documents read densely and sparsely."""
