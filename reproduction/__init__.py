"""The paper's experiments in a world of emoji: looks that are known, a prior from scratch, and every method."""
