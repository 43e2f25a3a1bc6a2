"""Modular diffusers: the blocks around `CoRe2Guidance`, and what it knows of a network."""
