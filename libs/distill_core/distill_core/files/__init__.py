"""Files that people and other programs write: text, JSON tables, paths. Imports no torch."""
