"""Layers cut over tensor-parallel ranks, and the loss over a vocabulary that is cut."""
