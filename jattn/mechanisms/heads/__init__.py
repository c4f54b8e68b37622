"""Mechanisms that treat heads differently: routing, gating and sharing among them."""
