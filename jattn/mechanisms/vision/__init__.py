"""Mechanisms for images and video."""
