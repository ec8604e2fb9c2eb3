"""The world of emoji: several vendors' drawings of the same things, each vendor in its own look."""
