"""The ways in which mode 'prompt' learns a concept: the paper's baselines, and LoRA."""
