"""Hardware as data: profiles with a source for every figure, strict to read."""
