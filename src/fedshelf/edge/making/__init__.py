"""Makes model files for the store: export, quantization."""
