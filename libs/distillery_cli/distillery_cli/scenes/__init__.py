"""Scenes: rendered, viewed, exported and converted."""
