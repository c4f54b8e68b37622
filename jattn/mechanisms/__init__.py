"""Attention mechanisms, one file each, grouped by family; `jattn.catalog` finds their entries by itself."""
