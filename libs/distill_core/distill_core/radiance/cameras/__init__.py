"""Cameras: poses, lenses, paths and samplers of virtual views."""
