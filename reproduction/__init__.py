"""The paper's experiments in a small world: real handwriting, a prior from scratch, and every method beside it."""
