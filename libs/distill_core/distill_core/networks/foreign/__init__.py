"""Configurations of foreign model folders, and the keys that are understood: no model library is imported here."""
