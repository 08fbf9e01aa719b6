"""fd-scale: feature distillation of vision backbones, up to 3 billion parameters."""

__version__ = "0.1.0"
