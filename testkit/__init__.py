"""What tests, demo, benchmarks and reproduction share: small models, a running ComfyUI, its client and its editor."""
