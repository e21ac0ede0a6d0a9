"""Scenes in closed form: data that needs no download, and oracles for tests."""
