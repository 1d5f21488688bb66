"""Tie policy for Loom, a framework that ties weights through a registry."""
