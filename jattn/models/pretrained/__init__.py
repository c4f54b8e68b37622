"""Models that somebody trained, on jattn's own layers: their packages, and readers of the files in them."""
