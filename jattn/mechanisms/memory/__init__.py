"""Memories beside or instead of attention: they are written while they are read."""
