"""Models: timm's by name, and a small residual network."""
