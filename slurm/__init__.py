"""Batch scripts; a package only so that they are installed with fd-scale."""
