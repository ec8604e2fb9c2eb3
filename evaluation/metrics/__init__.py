"""What the paper measures (Appendix D.3), each metric a function of uint8 images, (N, 3, H, W)."""
