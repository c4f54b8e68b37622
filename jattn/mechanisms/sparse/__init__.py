"""Mechanisms that look at a chosen part of the keys: static patterns, neighborhoods, routed blocks."""
