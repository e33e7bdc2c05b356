"""Checkpoints that load into any topology, and conversion to and from Hugging Face."""
