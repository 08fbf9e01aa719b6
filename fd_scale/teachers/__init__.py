"""Frozen models whose features are targets."""

from fd_scale.teachers.teacher import Teacher

__all__ = ["Teacher"]
