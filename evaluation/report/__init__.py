"""The page of an evaluation, made from its stored results alone."""
