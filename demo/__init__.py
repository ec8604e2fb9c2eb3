"""The one-command demo: small models, a real ComfyUI server, the shared workflows, a contact sheet."""
