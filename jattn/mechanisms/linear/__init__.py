"""Mechanisms of linear cost: feature maps, gates and states instead of a score matrix."""
