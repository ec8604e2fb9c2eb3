"""Generalized classifier-free guidance on tensors: the equation, its terms, the null text. Needs only torch."""
