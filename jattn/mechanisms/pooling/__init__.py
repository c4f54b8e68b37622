"""Mechanisms that turn a sequence into one vector."""
