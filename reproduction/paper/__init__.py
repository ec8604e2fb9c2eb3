"""The page of an evaluation of the paper's methods: its numbers, claims and limits beside the stored results."""
